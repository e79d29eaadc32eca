"""Each run's own servers ask for a key that nobody else on the machine can read."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.errors import ServerError
from lightning_grpo.keys import API_KEY_VARIABLE
from lightning_grpo.servers import serve_sglang
from lightning_grpo.servers.other_nodes import NodeMailbox, TrainerMailbox, build_servers
from lightning_grpo.servers.process import EmbeddedServers
from tests.fakes.tiny_model import make_tiny_model

UPDATES = (
    *("/generate", "/update_weights_from_disk", "/init_weights_update_group"),
    *("/update_weights_from_distributed", "/destroy_weights_update_group", "/pause_generation"),
    *("/continue_generation", "/abort_request", "/update_weight_version", "/flush_cache"),
    *("/release_memory_occupation", "/tokenize", "/server_info", "/model_info", "/v1/loads"),
)


def status(url: str, api_key: str | None = None, body: bytes | None = b"{}") -> int:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, body, headers), timeout=30
        ) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def command_lines() -> str:
    return " ".join(
        word for process in psutil.Process().children(recursive=True) for word in process.cmdline()
    )


def test_a_stranger_can_do_nothing_to_a_run_s_engine_and_reads_no_key(tmp_path):
    disable_progress_bar()  # its monitor thread would outlive the test
    model = make_tiny_model(tmp_path / "model", num_layers=1)
    servers = EmbeddedServers()
    try:
        (handle,) = servers.start(str(model), tmp_path)
        key = servers.api_key
        assert key
        assert {status(handle.url + path) for path in UPDATES} == {401}
        assert status(handle.url + "/pause_generation", "guess") == 401
        assert status(handle.url + "/pause_generation", key) == 200
        assert status(handle.url + "/health", body=None) == 200
        assert key not in command_lines()
        assert key not in handle.log_tail() + servers.describe()
        again = servers.restart(handle.url)
        assert servers.api_key == key
        assert status(again.url + "/pause_generation", key) == 200
    finally:
        servers.stop()
    assert all(key.encode() not in file.read_bytes() for file in tmp_path.rglob("*.log"))


def test_two_runs_have_two_keys():
    class Nothing(EmbeddedServers):
        def launches(self, model_path, run_dir):
            return []

    first, second = Nothing(), Nothing()
    first.start("model", Path())
    second.start("model", Path())
    assert first.api_key != second.api_key
    assert len(first.api_key) > 40


SGLANG = """
import json, logging, multiprocessing, os, sys
from sglang.child import run

logging.basicConfig(level=20)

if __name__ == "__main__":
    arguments = sys.argv[1:]
    logging.getLogger("sglang").info(f"{arguments=}")
    logging.getLogger("sglang").info("arguments %s", arguments)
    multiprocessing.set_start_method("spawn")
    child = multiprocessing.Process(target=run, args=(arguments,))
    child.start()
    child.join()
    with open("/proc/self/cmdline") as file:
        print(json.dumps({"arguments": arguments, "shown": file.read(), "status": child.exitcode}))
"""


@pytest.mark.parametrize("key", ["s3cret", ""])
def test_sglang_gets_its_key_and_nobody_reads_it(tmp_path, key):
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(SGLANG)
    (package / "child.py").write_text("import ray\ndef run(arguments):\n    print(arguments[0])\n")
    (tmp_path / "ray.py").touch()  # not the module of that name beside the script
    done = subprocess.run(
        [sys.executable, serve_sglang.__file__, "--model-path", "m"],
        env={"PYTHONPATH": str(tmp_path), API_KEY_VARIABLE: key},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["arguments"] == ["--model-path", "m", *(["--api-key", key] if key else [])]
    assert said["status"] == 0
    assert "--api-key" not in said["shown"]
    assert "arguments=" in done.stderr
    assert not key or key not in done.stderr + said["shown"]
    assert serve_sglang.VARIABLE == API_KEY_VARIABLE


def test_what_goes_to_a_server_node_is_for_its_owner_s_eyes(tmp_path):
    folder = tmp_path / "nodes"
    NodeMailbox(folder, 0, "host").beat()
    TrainerMailbox(folder, 1).ask(0, "start", api_key="s3cret")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["subprocess.Popen", "os.system", "os.nothing"])
def test_a_node_starts_servers_and_nothing_else(name):
    with pytest.raises(ServerError, match="no class of servers"):
        build_servers({"class_path": name, "init_args": {}})
