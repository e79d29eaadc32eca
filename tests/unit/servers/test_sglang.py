import sys

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.keys import API_KEY_VARIABLE
from lightning_grpo.servers import serve_sglang
from lightning_grpo.servers.base import free_ports, is_free, serving_devices
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.servers.sglang import ServerPython, SGLangServers, remember_python


@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")


def launches(tmp_path, **options):
    return SGLangServers(python=sys.executable, **options).launches("model", tmp_path)


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
