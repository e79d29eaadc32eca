from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from lightning_grpo.errors import ConfigError, ServerError, ServerStartError
from lightning_grpo.servers.base import (
    ADDRESSES_VARIABLE,
    RunningServers,
    normal_url,
    serving_devices,
    training_devices,
)
from tests.fakes.server import FakeServer, Fault


@pytest.fixture
def fake():
    """A fake server on a loop of its own, since RunningServers blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start():
        server = FakeServer()
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield server
    asyncio.run_coroutine_threadsafe(server.kill(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_servers_that_answer_are_taken_as_they_are(fake, tmp_path):
    servers = RunningServers([fake.url, f"localhost:{fake.port}/"])
    handles = servers.start("model", tmp_path)
    assert [h.url for h in handles] == [fake.url, f"http://localhost:{fake.port}"]
    assert fake.url in servers.describe()
    assert not servers.can_restart
    with pytest.raises(ServerError, match="was not started by this run"):
        servers.restart(fake.url)
    servers.stop()
    assert servers.handles == []


def test_the_addresses_of_a_launcher_are_used_where_none_are_given(fake, tmp_path, monkeypatch):
    monkeypatch.setenv(ADDRESSES_VARIABLE, f" 127.0.0.1:{fake.port} ,")
    assert [h.url for h in RunningServers().start("model", tmp_path)] == [fake.url]


def test_a_server_that_a_crashed_run_left_paused_is_taken(fake, tmp_path):
    fake.unpaused.clear()
    assert fake.paused
    (handle,) = RunningServers([fake.url], connect_timeout_s=5).start("model", tmp_path)
    assert handle.url == fake.url


@pytest.mark.parametrize(("gpus", "known"), [("0", (0,)), ("0\n1", ()), ("", ())])
def test_a_server_on_a_machine_with_one_gpu_is_on_that_one(
    fake, tmp_path, monkeypatch, gpus, known
):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<END\n{gpus}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # the trainer's own; a server's may be another
    (handle,) = RunningServers([fake.url]).start("model", tmp_path)
    assert handle.devices == known


def test_no_address_at_all_is_explained(tmp_path, monkeypatch):
    monkeypatch.delenv(ADDRESSES_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=f"{ADDRESSES_VARIABLE} is not set"):
        RunningServers().start("model", tmp_path)


def test_a_url_where_nothing_listens_is_named(tmp_path):
    servers = RunningServers(["http://127.0.0.1:9"], connect_timeout_s=0.2)
    with pytest.raises(ServerStartError, match=r"answers at http://127\.0\.0\.1:9 after 0\.2 s"):
        servers.start("model", tmp_path)


def test_what_answers_and_is_no_http_server_is_named(tmp_path):
    def greet(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(4096)  # the request, or closing would reset the connection

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=greet, args=(listener,))
        thread.start()
        try:
            with pytest.raises(ServerStartError, match=f"Nothing healthy answers at {url}"):
                RunningServers([url], connect_timeout_s=0.2).start("model", tmp_path)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_repeated_url_is_refused(fake, tmp_path):
    with pytest.raises(ConfigError, match="more than once"):
        RunningServers([fake.url, fake.url]).start("model", tmp_path)


@pytest.mark.parametrize("address", ["ftp://a:1", "http://host", "host"])
def test_an_address_without_scheme_or_port_is_refused(address):
    with pytest.raises(ConfigError):
        normal_url(address)


def test_an_empty_list_is_refused():
    with pytest.raises(ConfigError, match="at least one server"):
        RunningServers([])


@pytest.mark.parametrize(
    ("given", "message"),
    [(None, "wants an API key"), ("wrong", "wants another API key than the one given")],
)
def test_a_wrong_key_is_told_at_once(fake, tmp_path, given, message):
    fake.api_key = "right"
    with pytest.raises(ConfigError, match=rf"{fake.url} {message} \(it answered 401\)") as error:
        RunningServers([fake.url], connect_timeout_s=300, api_key=given).start("model", tmp_path)
    assert "wrong" not in str(error.value)
    RunningServers([fake.url], api_key="right").start("model", tmp_path)


@pytest.mark.parametrize("kind", ["hang", "drip", "drip headers"])
def test_a_server_that_never_quite_answers_is_given_up_in_time(fake, tmp_path, kind):
    fake.faults.append(Fault("/model_info", kind, times=99))
    with pytest.raises(ServerStartError, match=f"Nothing healthy answers at {fake.url}"):
        RunningServers([fake.url], connect_timeout_s=0.3).start("model", tmp_path)


def test_a_busy_server_is_asked_as_often_as_it_wants(fake, tmp_path):
    fake.faults.append(Fault("/model_info", "busy", times=1, retry_after="1"))
    RunningServers([fake.url], connect_timeout_s=20).start("model", tmp_path)
    assert fake.calls.count("/model_info") == 2


def test_what_a_server_answers_instead_is_told(fake, tmp_path):
    fake.faults.append(Fault("/model_info", "error", times=99))
    with pytest.raises(ServerStartError, match=r"after 0\.2 s\. It answered 500\."):
        RunningServers([fake.url], connect_timeout_s=0.2).start("model", tmp_path)


@pytest.mark.parametrize(
    ("present", "serving", "training"),
    [
        ([0], [0], [0]),
        ([0, 1], [1], [0]),
        ([0, 1, 2], [1, 2], [0]),
        ([0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7], [0, 1, 2, 3]),
    ],
)
def test_half_of_the_gpus_rounded_up_serve_and_the_others_train(present, serving, training):
    assert serving_devices(present) == serving
    assert training_devices(present, serving) == training
