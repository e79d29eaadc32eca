import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.weights.gather import empty_run, make_buckets, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        f"w{i}": torch.randn(shape, generator=generator).to(DTYPES[kind])
        for i, (shape, kind) in enumerate(shapes)
    }


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(0, 2)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 400),
)
def test_every_tensor_comes_back_bit_for_bit_once(shapes, bucket_bytes):
    tensors = tensors_of(shapes)
    buckets = make_buckets(tensors, bucket_bytes)
    back = {}
    for bucket in buckets:
        assert len(bucket.names) == 1 or bucket.flat.nbytes <= bucket_bytes
        unpacked = unpack(bucket)
        assert not back.keys() & unpacked.keys()
        back |= unpacked
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype


def test_the_bytes_are_the_tensors_end_to_end_in_the_order_of_the_names():
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3.0]])}
    (bucket,) = make_buckets(tensors, 1 << 20)
    assert bucket.names == ("b", "a")
    assert bucket.dtype == "float32"
    assert bucket.shapes == ((2,), (1, 1))
    assert bucket.flat.dtype == torch.uint8
    assert bucket.flat.view(torch.float32).tolist() == [1.0, 2.0, 3.0]


def test_a_tensor_that_is_no_run_of_memory_is_sent_in_its_own_order():
    matrix = torch.arange(6.0).reshape(2, 3).t()
    (bucket,) = make_buckets({"m": matrix}, 1 << 20)
    assert torch.equal(unpack(bucket)["m"], matrix)


def test_copies_that_were_laid_end_to_end_are_sent_from_where_they_lie():
    tensors = tensors_of([((2, 3), 0), ((4,), 1), ((), 0), ((3, 1), 1)])
    run = empty_run(tensors, None, None)
    for name, tensor in tensors.items():
        run[name].copy_(tensor)
    for buckets in (make_buckets(run, 1 << 20), make_buckets(run, 12)):
        assert len({b.flat.untyped_storage().data_ptr() for b in buckets}) == 2  # one a dtype
        for bucket in buckets:
            for name, tensor in unpack(bucket).items():
                assert torch.equal(tensor, tensors[name])
                assert tensor.data_ptr() == run[name].data_ptr()


def test_copies_in_another_order_than_they_lie_in_are_sent_in_theirs():
    run = empty_run({"a": torch.zeros(2), "b": torch.zeros(2)}, None, None)
    run["a"].fill_(1.0)
    run["b"].fill_(2.0)
    (bucket,) = make_buckets({"b": run["b"], "a": run["a"]}, 1 << 20)
    assert bucket.flat.view(torch.float32).tolist() == [2.0, 2.0, 1.0, 1.0]


def test_room_is_made_in_the_dtype_asked_for_but_whole_numbers_keep_theirs():
    run = empty_run({"w": torch.zeros(2, 2), "n": torch.zeros(1).long()}, torch.bfloat16, "cpu")
    assert {name: (t.dtype, t.shape) for name, t in run.items()} == {
        "w": (torch.bfloat16, (2, 2)),
        "n": (torch.int64, (1,)),
    }


def test_the_request_flushes_nothing_and_aborts_nothing():
    (bucket,) = make_buckets({"a": torch.zeros(2, 2)}, 1 << 20)
    body = bucket.request("group", None)
    assert body["flush_cache"] is False
    assert body["abort_all_requests"] is False
    assert body["load_format"] == "flattened_bucket"
    assert "weight_version" not in body
    assert bucket.request("group", "run:3")["weight_version"] == "run:3"
    assert (body["names"], body["dtypes"], body["shapes"]) == (["a"], ["float32"], [[2, 2]])
