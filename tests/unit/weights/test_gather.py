import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from lightning_grpo.weights.gather import (
    empty_run,
    gather_weights,
    make_buckets,
    plain_name,
    plain_names,
    round_by_chance,
    unpack,
)
from tests.fakes.devices import ON_A_GPU


def tiny(tied=True):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


class Wrapper(nn.Module):
    def __init__(self, inner, name):
        super().__init__()
        self.add_module(name, inner)
        self.value_head = nn.Linear(2, 2)


def saved_names(model, folder):
    # Its progress bar would leave a thread behind.
    disable_progress_bar()
    model.save_pretrained(folder)
    enable_progress_bar()
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_that_save_pretrained_writes(tmp_path, tied):
    model = tiny(tied)
    gathered = gather_weights(model)
    assert set(gathered) == saved_names(model, tmp_path)
    assert ("lm_head.weight" in gathered) is not tied


@pytest.mark.parametrize("wrapping", [["model"], ["policy", "model"], ["module"]])
def test_wrappers_leave_no_trace_and_their_own_weights_stay_behind(tmp_path, wrapping):
    model = tiny()
    expected = saved_names(model, tmp_path)
    wrapped = model
    for name in reversed(wrapping):
        wrapped = Wrapper(wrapped, name)
    assert set(gather_weights(wrapped)) == expected


def test_compiled_and_checkpointed_layers_have_their_plain_names(tmp_path):
    model = tiny()
    expected = saved_names(model, tmp_path)
    inner = model.model.layers[0]
    compiled = nn.Module()
    compiled.add_module("_orig_mod", inner)
    model.model.layers[0] = compiled
    assert set(gather_weights(Wrapper(model, "model"))) == expected
    name = "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight"
    assert plain_name(name) == "model.layers.0.mlp.up_proj.weight"


def test_a_tied_head_is_left_out_and_a_free_one_kept():
    names = ["model.embed.weight", "lm_head.weight"]
    assert plain_names(names, "", tied=True) == {names[0]: names[0]}
    assert set(plain_names(names, "", tied=False)) == set(names)


def test_the_copy_shares_no_memory_with_the_model_and_keeps_its_values():
    model = tiny()
    gathered = gather_weights(model)
    before = {name: tensor.clone() for name, tensor in gathered.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, tensor in gathered.items():
        assert torch.equal(tensor, before[name])


def test_what_was_gathered_is_sent_without_another_copy():
    gathered = gather_weights(tiny(), torch.bfloat16)
    (bucket,) = make_buckets(gathered, 1 << 30)
    assert list(gathered) == list(bucket.names)
    assert bucket.flat.data_ptr() == next(iter(gathered.values())).data_ptr()


def test_weights_are_cast_to_the_serving_dtype():
    gathered = gather_weights(tiny(), torch.bfloat16)
    assert {tensor.dtype for tensor in gathered.values()} == {torch.bfloat16}


def test_a_rank_that_keeps_nothing_gets_nothing():
    assert gather_weights(tiny(), keep=False) == {}


def test_a_plain_module_keeps_its_names():
    assert set(gather_weights(nn.Linear(2, 3))) == {"weight", "bias"}


# ---- buckets ------------------------------------------------------------------------------------

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


# ---- rounding -----------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_of_many_roundings_is_the_value(dtype, device):
    value = 1.0 + torch.finfo(dtype).eps * 0.03
    for signed in (value, -value):
        rounded = round_by_chance(torch.full((100_000,), signed, device=device), dtype, "w").float()
        assert len(rounded.unique()) == 2
        assert rounded.mean().item() == pytest.approx(signed, abs=torch.finfo(dtype).eps * 3e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_what_the_dtype_can_hold_stays_itself(dtype):
    values = torch.randn(10_000).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    assert torch.equal(round_by_chance(values.float(), dtype, "w"), values)


@pytest.mark.parametrize("dtype", HALF)
def test_no_value_moves_by_a_whole_unit(dtype):
    values = torch.randn(10_000) * 0.02
    rounded = round_by_chance(values, dtype, "w").float()
    unit = values.abs().log2().floor().exp2() * torch.finfo(dtype).eps
    assert ((rounded - values).abs() < unit.clamp_min(2**-24)).all()


def test_a_parameter_rounds_alike_each_time_and_unlike_others():
    values = torch.randn(1000)
    first = round_by_chance(values, torch.bfloat16, "q_proj")
    assert torch.equal(round_by_chance(values.clone(), torch.bfloat16, "q_proj"), first)
    assert not torch.equal(round_by_chance(values, torch.bfloat16, "k_proj"), first)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_not_finite_stays_so(dtype):
    bits = [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000]  # the first is CUDA's NaN
    values = torch.tensor([*bits, -0x800000], dtype=torch.int32).view(torch.float32)
    rounded = round_by_chance(values, dtype, "w")
    assert torch.equal(rounded.isnan(), torch.tensor([True, True, True, False, False]))
    assert rounded[3:].tolist() == [float("inf"), float("-inf")]


def test_where_nothing_is_lost_nothing_is_drawn():
    values = torch.randn(10)
    assert torch.equal(round_by_chance(values, torch.float32, "w"), values)
    wide = torch.randn(10, dtype=torch.float64)
    assert torch.equal(round_by_chance(wide, torch.bfloat16, "w"), wide.bfloat16())
