import itertools

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.servers.base import ServerLoad
from lightning_grpo.servers.sglang import GIB, graph_sizes, servers_per_gpu, size_servers

H200 = 143_771 << 20
SMALL = {"weight_bytes": 270_000_000, "kv_bytes_per_token": 23_040, "vocab_size": 49_152}
LARGE = {"weight_bytes": 3_090_000_000, "kv_bytes_per_token": 28_672, "vocab_size": 151_936}


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 100, 256, 1000, 2048, 4096])
def test_every_batch_is_padded_by_an_eighth_at_most_once_it_counts(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    pairs = list(itertools.pairwise(sizes))
    assert all(b - a <= max(4, a / 8) for a, b in pairs)
    assert len(sizes) <= 80


def test_a_small_model_on_a_large_gpu_takes_what_its_requests_need_and_no_more():
    size = size_servers(ServerLoad(2048, context_tokens=512, **SMALL), 1, H200)
    assert size.flags["max-running-requests"] == 2048
    assert size.flags["cuda-graph-bs-decode"][-1] == 2048
    assert size.flags["context-length"] == 512
    assert size.flags["max-total-tokens"] >= 2048 * 512
    assert size.flags["max-total-tokens"] * 23_040 < 0.2 * H200
    assert "2,048 decoded at once, all by graphs" in size.describe()


def test_of_several_batches_in_flight_one_is_decoded_at_a_time():
    load = ServerLoad(3072, 1024, 512, **SMALL)
    assert size_servers(load, 1, H200).flags["max-running-requests"] == 1024
    assert size_servers(load, 2, H200, per_gpu=2).flags["max-running-requests"] == 512


@pytest.mark.parametrize(
    ("batch", "weights", "gpus", "cores", "count"),
    [
        (1024, 270_000_000, 1, 16, 4),
        (1024, 270_000_000, 1, 8, 2),
        (1024, 270_000_000, 4, 64, 1),
        (128, 270_000_000, 1, 16, 1),
        (1024, 14_000_000_000, 1, 64, 1),
        (1024, 0, 1, 64, 1),
    ],
)
def test_several_servers_share_a_gpu_where_a_small_model_has_many_requests(
    batch, weights, gpus, cores, count
):
    load = ServerLoad(3 * batch, batch, weight_bytes=weights)
    assert servers_per_gpu(load, gpus, cores) == count


def test_servers_on_one_gpu_divide_its_memory():
    load = ServerLoad(3072, 3072, 1280, **LARGE)
    one, two = (size_servers(load, n, H200, per_gpu=n) for n in (1, 2))
    each = two.flags["max-total-tokens"] * LARGE["kv_bytes_per_token"] + LARGE["weight_bytes"]
    assert 2 * each < 0.88 * H200
    assert one.flags["max-total-tokens"] > two.flags["max-total-tokens"]


def test_servers_share_the_requests_evenly():
    one, three = (
        size_servers(ServerLoad(1000, context_tokens=512, **SMALL), n, H200) for n in (1, 3)
    )
    assert one.flags["max-running-requests"] == 1000
    assert three.flags["max-running-requests"] == 334


def test_a_trainer_on_the_same_gpu_leaves_the_rest_to_the_cache_and_it_is_said():
    load = ServerLoad(3072, context_tokens=1280, trainer_bytes=79 * GIB, **LARGE)
    alone, shared = (size_servers(load, 1, H200, shared=shared) for shared in (False, True))
    for size, room in ((alone, 0.88 * H200), (shared, 0.96 * H200 - 79 * GIB)):
        cache = size.flags["max-total-tokens"] * LARGE["kv_bytes_per_token"]
        assert cache + LARGE["weight_bytes"] < room
        assert size.memory_fraction * H200 >= cache + LARGE["weight_bytes"]
    assert "of what all requests may need" in shared.describe()


def test_a_gpu_that_holds_neither_is_refused_with_what_would_help():
    load = ServerLoad(64, context_tokens=4096, trainer_bytes=130 * GIB, **LARGE)
    with pytest.raises(ConfigError, match=r"the trainer needs about 130.*max_tokens_per_microb"):
        size_servers(load, 1, H200, shared=True)
    huge = ServerLoad(64, context_tokens=4096, weight_bytes=140 * GIB, kv_bytes_per_token=300_000)
    with pytest.raises(ConfigError, match=r"140\.0 GiB of weights.*raise `tp`"):
        size_servers(huge, 1, H200)
    assert size_servers(huge, 1, H200, tp=2).flags["max-total-tokens"] > 64 * 4096 * 0.9


def test_what_is_not_known_is_left_to_sglang_but_for_a_shared_gpu():
    load = ServerLoad(100)
    assert size_servers(load, 1, H200).memory_fraction is None
    assert size_servers(load, 1, H200, shared=True).memory_fraction == 0.4
    assert (
        "max-total-tokens"
        not in size_servers(ServerLoad(100, context_tokens=512, **SMALL), 1, 0).flags
    )


def test_what_follows_from_a_flag_of_the_users_follows_from_it():
    given = {"max-running-requests": 300, "context-length": 1024}
    size = size_servers(ServerLoad(2048, context_tokens=512, **SMALL), 1, H200, given=given)
    assert size.flags["cuda-graph-bs-decode"][-1] == 300
    assert size.flags["max-total-tokens"] == int(300 * 1024 * 1.05)


@pytest.mark.parametrize(
    ("flag", "left_out"),
    [
        ("cuda-graph-max-bs-decode", "cuda-graph-bs-decode"),
        ("disable-cuda-graph", "cuda-graph-bs-decode"),
        ("disable-overlap-schedule", "enable-prefill-delayer"),
        ("prefill-delayer-max-delay-ms", "enable-prefill-delayer"),
    ],
)
def test_a_users_own_graphs_or_delays_are_not_mixed_with_ours(flag, left_out):
    size = size_servers(ServerLoad(2048, context_tokens=512, **SMALL), 1, H200, given={flag: True})
    assert left_out not in size.flags
    assert "max-running-requests" in size.flags
