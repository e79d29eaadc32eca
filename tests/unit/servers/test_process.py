from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.errors import ServerError, ServerStartError
from lightning_grpo.keys import API_KEY_VARIABLE
from lightning_grpo.servers import serve_sglang
from lightning_grpo.servers.other_nodes import NodeMailbox, TrainerMailbox, build_servers
from lightning_grpo.servers.process import (
    EmbeddedServers,
    Launch,
    OwnedServers,
    likely_cause,
)
from lightning_grpo.serving.health import process_alive
from tests.fakes.forked_servers import ForkedServers
from tests.fakes.small_servers import SERVER, PythonServers
from tests.fakes.tiny_model import make_tiny_model


def test_servers_start_answer_restart_and_leave_nothing(tmp_path):
    servers = PythonServers(SERVER, num_servers=2)
    first, second = servers.start("model", tmp_path)
    try:
        assert process_alive(first.pid)
        assert first.url != second.url
        assert "loading" in first.log_tail()
        assert f"pid {first.pid}" in servers.describe()
        psutil.Process(first.pid).kill()
        again = servers.restart(first.url)
        assert process_alive(again.pid)
        assert again.pid != first.pid
        assert servers.handles == [again, second]
    finally:
        servers.stop()
    assert not any(process_alive(h.pid) for h in (first, second, again))
    assert servers.handles == []
    servers.stop()


def test_a_restart_replaces_a_server_that_still_runs(tmp_path):
    servers = PythonServers(SERVER)
    (first,) = servers.start("model", tmp_path)
    try:
        again = servers.restart(first.url)
        assert not process_alive(first.pid)
        assert process_alive(again.pid)
    finally:
        servers.stop()


def test_a_server_is_told_from_another_that_writes_to_the_same_log(tmp_path):
    # As two runs in one folder did: each took the first READY of the log for its own engine's.
    stranger = "READY http://127.0.0.1:9"
    code = f"open({str(tmp_path / 'servers/0.log')!r}, 'a').write('{stranger}\\n')\n{SERVER}"
    first, second = PythonServers(code), PythonServers(code)
    try:
        ours, theirs = first.start("model", tmp_path), second.start("model", tmp_path)
        assert ours[0].log_path == theirs[0].log_path
        assert "http://127.0.0.1:9" not in (ours[0].url, theirs[0].url)
        assert ours[0].url != theirs[0].url
    finally:
        first.stop()
        second.stop()


def test_a_server_that_prints_much_is_not_held_up(tmp_path):
    code = "print('y' * 300_000)\n" + SERVER
    servers = PythonServers(code)
    (handle,) = servers.start("model", tmp_path)
    servers.stop()
    assert handle.log_path.read_text().count("y") == 300_000


def test_a_start_that_fails_shows_the_end_of_the_log_and_the_likely_cause(tmp_path):
    servers = PythonServers("import lightning_grpo_is_not_called_so")
    with pytest.raises(ServerStartError) as error:
        servers.start("model", tmp_path)
    message = str(error.value)
    assert "ended with status 1" in message
    assert "package lightning_grpo_is_not_called_so is missing" in message
    assert message.count("Traceback") == 1


def test_a_start_that_takes_too_long_ends_and_leaves_no_process(tmp_path):
    servers = PythonServers("print('still loading'); import time; time.sleep(300)", 1, 1.0)
    before = {c.pid for c in psutil.Process().children(recursive=True)}
    with pytest.raises(ServerStartError, match="not ready in time") as error:
        servers.start("model", tmp_path)
    assert "still loading" in str(error.value)
    assert {c.pid for c in psutil.Process().children(recursive=True)} <= before


def test_one_that_fails_ends_the_others(tmp_path):
    code = f"import sys, os\nif not os.path.exists({str(tmp_path / 'flag')!r}):\n"
    code += f"    open({str(tmp_path / 'flag')!r}, 'w').close(); sys.exit(3)\n{SERVER}"
    with pytest.raises(ServerStartError, match="status 3"):
        PythonServers(code, num_servers=2).start("model", tmp_path)


def test_a_stop_while_starting_ends_the_start(tmp_path):
    servers = PythonServers("import time; time.sleep(300)", 1, 100.0)
    errors = []

    def start():
        try:
            servers.start("model", tmp_path)
        except ServerStartError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    while not (tmp_path / "servers/0.log").exists() or not servers._processes:
        time.sleep(0.01)
    servers.stop()
    thread.join(30)
    assert errors


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("OSError: [Errno 98] Address already in use", "the port is in use"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "the GPU's memory is full"),
        ("ModuleNotFoundError: No module named 'sglang'", "package sglang is missing"),
        ("OSError: Repo id must use alphanumeric chars", "the model path is wrong"),
        ("something else", ""),
    ],
)
def test_likely_causes(log, cause):
    found = likely_cause(log, 1)
    assert cause in found
    assert bool(found) == bool(cause)


def test_a_kill_points_at_memory_unless_the_log_tells_why_a_server_ended_itself():
    assert "want of memory" in likely_cause("", -9)
    log = (
        "  File x.py, line 3\nValueError: {} is odd.\nkill_process_tree called: include_parent=True"
    )
    assert likely_cause(log.format("The head dim 65"), -9) == "ValueError: The head dim 65 is odd."
    full = "Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.2."
    assert "`memory_fraction`" in likely_cause(log.format(full), -9)
    handled = "ImportError: no fast kernel, using another"
    assert "want of memory" in likely_cause(handled, -9)
    assert likely_cause(handled, 1) == ""


SLOW_TO_END = """
import http.server, pathlib, signal, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

folder = pathlib.Path(sys.argv[1])
server = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch())
if not (folder / "began").exists():
    print(f"READY http://127.0.0.1:{server.server_port}", flush=True)
(folder / "began").touch()
server.serve_forever()
"""
"""Ready the first time, never again; its end takes the supervisor's whole grace time."""


class Slow(OwnedServers):
    """One such server."""

    start_timeout_s = 500.0

    def launches(self, model_path, run_dir):
        return [Launch([sys.executable, "-c", SLOW_TO_END, str(run_dir)], run_dir / "log", {})]


def test_a_server_whose_process_was_killed_is_gone(tmp_path):
    servers = Slow()
    (handle,) = servers.start("model", tmp_path)
    assert not servers.is_gone(handle.url)
    os.kill(handle.pid, signal.SIGKILL)
    while not servers.is_gone(handle.url):
        time.sleep(0.02)
    servers.stop()
    assert servers.is_gone(handle.url)


@pytest.mark.timeout(60)
def test_a_stop_while_a_restart_ends_the_old_server_ends_the_new_one_at_once(tmp_path):
    servers, failures = Slow(), []
    (handle,) = servers.start("model", tmp_path)

    def restart() -> None:
        try:
            servers.restart(handle.url)
        except ServerStartError as error:
            failures.append(str(error))

    restarting = threading.Thread(target=restart)
    restarting.start()
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    servers.stop()
    restarting.join()
    assert len(failures) == 1
    assert "ended with status" in failures[0]
    assert servers.handles == []


def test_servers_can_be_handed_to_a_spawned_rank_which_owns_none_of_them(tmp_path):
    servers = Slow()
    servers.start("model", tmp_path)
    copy = pickle.loads(pickle.dumps(servers))
    copy.stop()
    assert copy.handles == []
    assert len(servers.handles) == 1
    servers.stop()


# ---- each run's own servers ask for a key that nobody else on the machine can read --------------

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
    servers = ForkedServers()
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
    assert said["arguments"] == ["--model-path", "m", *([f"--api-key={key}"] if key else [])]
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
