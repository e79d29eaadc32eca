import itertools
import json
import os
import re
import sys

import pytest

from lightning_grpo.errors import ConfigError, ServerError
from lightning_grpo.keys import API_KEY_VARIABLE
from lightning_grpo.servers import serve_sglang
from lightning_grpo.servers.base import Machine, ServerLoad, free_ports, is_free, serving_devices
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.servers.sglang import (
    NOT_ON_CPU,
    ServerPython,
    SGLangServers,
    install_server,
    needs_on_cpu,
    remember_python,
    remembered_python,
    resolve_python,
)
from lightning_grpo.servers.sizing import (
    GIB,
    ServersTooLargeError,
    graph_sizes,
    servers_per_gpu,
    size_servers,
)


@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")


def launches(tmp_path, **options):
    return SGLangServers(python=sys.executable, **options).launches("model", tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_tied_head_that_sglang_would_leave_empty_is_refused_before_it_is_started(
    kind, tied, tmp_path
):
    config = {"architectures": [kind], "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    servers = SGLangServers(python=sys.executable, flags={"device": "cpu"})
    if tied and kind == "Qwen3MoeForCausalLM":
        with pytest.raises(ConfigError, match=r"head of its own .* Qwen3MoeForCausalLM; .*save it"):
            servers.launches(str(tmp_path), tmp_path)
    else:
        assert len(servers.launches(str(tmp_path), tmp_path)) == 1


def test_each_of_the_processes_that_share_layers_on_a_cpu_has_a_core(tmp_path):
    flags = {"device": "cpu"}
    alone, shared = (launches(tmp_path, tp=tp, flags=flags)[0].environment for tp in (1, 3))
    name = "SGLANG_CPU_OMP_THREADS_BIND"
    assert name not in alone
    cores = list(map(int, shared[name].split("|")))
    assert len(cores) == 3
    assert set(cores) <= os.sched_getaffinity(0)


@pytest.mark.parametrize("tells", [False, True])
def test_servers_are_started_to_tell_routes_where_the_run_replays_them(tells, tmp_path):
    servers = SGLangServers(python=sys.executable, flags={"device": "cpu"})
    servers.tells_routes = tells
    (launch,) = servers.launches("model", tmp_path)
    assert ("--enable-return-routed-experts" in launch.command) is tells


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_run_starts_servers_that_give_equal_requests_equal_bits(
    deterministic, tmp_path
):
    servers = SGLangServers(python=sys.executable, tp=4)
    servers.deterministic = deterministic
    (launch,) = servers.launches("model", tmp_path)
    assert ("--enable-deterministic-inference" in launch.command) is deterministic


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"device": "cpu"}, "`trainer.deterministic` needs"),
        ({"attention-backend": "torch_native"}, "`servers.flags.attention-backend` must be one of"),
        ({"enable_deterministic_inference": False}, "must be on in a deterministic run, got False"),
    ],
)
def test_what_would_leave_a_deterministic_run_to_chance_is_refused(flags, named, tmp_path):
    servers = SGLangServers(python=sys.executable, flags=flags)
    servers.deterministic = True
    with pytest.raises(ConfigError, match=re.escape(named)):
        servers.launches("model", tmp_path)


def test_the_command_line_follows_the_parameters(tmp_path):
    (launch,) = launches(
        tmp_path,
        tp=2,
        devices=[4, 5],
        memory_fraction=0.5,
        flags={"attention_backend": "triton", "disable-radix-cache": True, "dtype": None},
    )
    command = list(launch.command)
    assert command[:4] == [sys.executable, serve_sglang.__file__, "--model-path", "model"]
    text = " ".join(command)
    assert "--tp-size 2" in text
    assert "--mem-fraction-static 0.5" in text
    assert "--attention-backend triton" in text
    assert text.endswith("--disable-radix-cache")
    assert "--host 127.0.0.1" in text
    assert "dtype" not in text
    assert launch.environment == {"CUDA_VISIBLE_DEVICES": "4,5", API_KEY_VARIABLE: ""}
    assert launch.devices == (4, 5)
    port = command[command.index("--port") + 1]
    assert launch.url == f"http://127.0.0.1:{port}"
    assert 20000 <= int(port) < 30000


def test_each_group_of_gpus_gets_a_server(tmp_path):
    made = launches(tmp_path, tp=2, devices=[0, 1, 2, 3])
    assert [launch.devices for launch in made] == [(0, 1), (2, 3)]
    assert len({launch.url for launch in made}) == 2


def test_the_environment_says_which_gpus_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert [launch.devices for launch in launches(tmp_path)] == [(1,), (2,)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (launch,) = launches(tmp_path)
    assert launch.devices == (0,)
    assert "--mem-fraction-static 0.4" in " ".join(launch.command)


@pytest.mark.parametrize(
    ("visible", "device", "told"),
    [
        ("1", 0, "1"),
        ("2,3", 1, "3"),
        ("GPU-32d382d1-ea10,GPU-58313fff-b6b0", 1, "GPU-58313fff-b6b0"),
        ("MIG-1c2", 0, "MIG-1c2"),
        ("3,2,-1,0", 1, "2"),
    ],
)
def test_gpus_are_numbered_among_the_visible_as_torch_does(
    tmp_path, monkeypatch, visible, device, told
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (launch,) = launches(tmp_path, devices=[device])
    assert launch.environment["CUDA_VISIBLE_DEVICES"] == told
    assert launch.devices == (device,)


def test_a_gpu_that_is_not_visible_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(ConfigError, match=r"GPUs 0 to 1, .* got \[2\]"):
        launches(tmp_path, num_servers=1, devices=[2])


def test_where_nobody_trains_every_gpu_serves_and_none_is_shared(tmp_path, monkeypatch):
    servers = SGLangServers(python=sys.executable)
    servers.dedicated = True
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert [each.devices for each in servers.launches("model", tmp_path)] == [(0,), (1,), (2,)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (launch,) = servers.launches("model", tmp_path)
    assert "--mem-fraction-static" not in launch.command


def test_without_a_gpu_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="EmbeddedServers on a CPU"):
        launches(tmp_path)
    (launch,) = launches(tmp_path, flags={"device": "cpu"})
    text = " ".join(launch.command)
    assert "--device cpu" in text
    assert "--dtype float32" in text
    assert launch.environment["OMP_NUM_THREADS"] == "1"
    assert launch.devices == ()
    (launch,) = launches(tmp_path, flags={"device": "cpu", "dtype": "bfloat16", "host": "::"})
    text = " ".join(launch.command)
    assert "--dtype bfloat16" in text
    assert "float32" not in text
    assert "127.0.0.1" not in text
    assert launch.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_an_environment_made_for_the_cpu_serves_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    remember_python(ServerPython(sys.executable, "0.5.19", "cpu"))
    (launch,) = SGLangServers().launches("model", tmp_path)
    assert "--device cpu" in " ".join(launch.command)
    (launch,) = SGLangServers(flags={"device": "cuda"}).launches("model", tmp_path)
    assert launch.devices == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_servers": 0}, "`num_servers` must be >= 1"),
        ({"tp": 0}, "`tp` must be >= 1"),
        ({"devices": [0, 0]}, "must not repeat"),
        ({"memory_fraction": 1.5}, "between 0 and 1"),
        ({"flags": {"tp_size": 2}}, "must not set tp-size"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        SGLangServers(**options)


def test_too_many_servers_for_the_gpus_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="2 x 2"):
        launches(tmp_path, num_servers=2, tp=2, devices=[0, 1, 2])


def test_half_of_the_gpus_rounded_up_serve():
    assert serving_devices([0]) == [0]
    assert serving_devices([0, 1]) == [1]
    assert serving_devices([0, 1, 2]) == [1, 2]
    assert serving_devices([]) == []


def test_free_ports_are_distinct_and_free():
    ports = free_ports(5, (21000, 21100))
    assert len(set(ports)) == 5
    assert all(is_free(port) for port in ports)
    with pytest.raises(ConfigError, match="`port_range` must hold 5"):
        free_ports(5, (21000, 21003))


@pytest.mark.parametrize(
    "options", [{"num_servers": 0}, {"max_running_requests": 0}, {"start_timeout_s": 0}]
)
def test_embedded_settings_are_checked_at_construction(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EmbeddedServers(**options)


def test_the_embedded_engine_gets_one_thread_and_its_own_log(tmp_path):
    first, second = EmbeddedServers(num_servers=2).launches("model", tmp_path)
    assert first.environment["OMP_NUM_THREADS"] == "1"
    assert first.log_path != second.log_path
    assert "--exit-with-stdin" in first.command


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_the_servers_python_is_remembered_until_it_is_gone(tmp_path):
    with pytest.raises(ConfigError, match="install-server"):
        resolve_python("auto")
    python = tmp_path / "python"
    python.touch()
    installed = ServerPython(str(python), "0.5.19", "cpu")
    file = remember_python(installed)
    assert resolve_python("auto") == installed
    assert resolve_python(str(python)) == installed
    assert resolve_python(sys.executable) == ServerPython(sys.executable)
    python.unlink()
    assert remembered_python() is None
    python.touch()
    file.write_text("{")
    assert remembered_python() is None


def test_an_interpreter_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="nowhere"):
        resolve_python("/nowhere/python")


def test_torch_comes_first_and_stays_and_nothing_for_gpus_comes_on_a_cpu():
    listed = (
        "aiohttp\taiohttp\ntorch\ttorch==2.13.0\nsglang-kernel\tsglang-kernel==0.4.6\n"
        "xgrammar\txgrammar==0.2.1\nflashinfer-python\tflashinfer_python[cu13]==0.6.18\n"
    )
    assert needs_on_cpu(listed) == [
        ["torch==2.13.0"],
        ["torch==2.13.0", "aiohttp", "triton"],
        ["--no-deps", "xgrammar==0.2.1"],
    ]
    assert not {"torch", "aiohttp"} & NOT_ON_CPU


def test_a_package_that_cannot_be_had_is_named(tmp_path):
    said = []
    with pytest.raises(ServerError, match=r"sglang==0\.0\.0"):
        install_server(
            tmp_path / "environment",
            version="0.0.0",
            pip_arguments=["--no-index", "--disable-pip-version-check"],
            say=said.append,
        )
    assert said == [f"making {tmp_path / 'environment'}", "installing sglang==0.0.0"]


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


def test_of_several_batches_in_flight_one_and_a_half_are_decoded_at_a_time():
    load = ServerLoad(3072, 1024, 512, **SMALL)
    assert size_servers(load, 1, H200).flags["max-running-requests"] == 1536
    assert size_servers(load, 2, H200, per_gpu=2).flags["max-running-requests"] == 768
    load = ServerLoad(1024, 1024, 512, **SMALL)
    assert size_servers(load, 1, H200).flags["max-running-requests"] == 1024
    # Of memory that isn't known nothing says that they don't fit.
    for load, gpu_bytes in (
        (ServerLoad(3072, 1024, 512, **SMALL), 0),
        (ServerLoad(3072, 1024, 512), H200),
    ):
        assert size_servers(load, 1, gpu_bytes).flags["max-running-requests"] == 1536


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


def test_as_many_servers_share_a_gpu_as_fit_beside_the_trainer():
    servers = SGLangServers(python=sys.executable)
    servers.machine = Machine(gpus=1, gpu_bytes=80 * GIB, cores=16)
    for trainer, expected, at_once in ((10, 4, 1536), (54, 2, 1024), (66, 1, 1024)):
        load = {**LARGE, "trainer_bytes": trainer * GIB}
        servers.load = ServerLoad(3072, 1024, 512, **load)
        layout = servers.layout()
        assert (layout.per_gpu, len(layout.groups), layout.shared) == (expected, expected, True)
        # Where the cache can't hold more, one batch is decoded at a time.
        assert layout.size.flags["max-running-requests"] == at_once // expected
    servers.num_servers = 4  # the user's own number is not changed
    with pytest.raises(ServersTooLargeError):
        servers.layout()


def test_a_fraction_of_the_users_own_is_neither_refused_nor_limited(tmp_path):
    servers = SGLangServers(python=sys.executable, memory_fraction=0.3)
    servers.machine = Machine(gpus=1, gpu_bytes=80 * GIB, cores=16)
    servers.load = ServerLoad(3072, 1024, 512, **LARGE, trainer_bytes=75 * GIB)
    command = " ".join(servers.launches("model", tmp_path)[0].command)
    assert "--mem-fraction-static 0.3" in command
    assert "max-total-tokens" not in command


def test_servers_for_another_machine_use_its_gpus_and_cores():
    servers = SGLangServers(python=sys.executable, tp=2)
    servers.machine = Machine(gpus=8, gpu_bytes=80 * GIB, cores=64)
    servers.load = ServerLoad(100, 100, 512, **LARGE)
    layout = servers.layout()
    assert list(layout.groups) == [(4, 5), (6, 7)]
    assert layout.size.weight_bytes == LARGE["weight_bytes"] // 2
    assert servers.planned_devices == (4, 5, 6, 7)


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
