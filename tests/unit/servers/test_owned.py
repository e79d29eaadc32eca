"""Servers that a run owns, restarted and stopped by two threads at once."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time

import pytest

from lightning_grpo.errors import ServerStartError
from lightning_grpo.servers.process import Launch, OwnedServers

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
