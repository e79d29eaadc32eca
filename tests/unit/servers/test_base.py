from __future__ import annotations

import asyncio
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lightning_grpo.errors import ConfigError, ServerError, ServerStartError
from lightning_grpo.servers.base import (
    ADDRESSES_VARIABLE,
    HttpAnswer,
    RunningServers,
    ServerList,
    answers_soon,
    may_be_one,
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


class Page(BaseHTTPRequestHandler):
    """Answers with its server's `text` and `status`, and keeps the headers that came."""

    def do_GET(self):
        self.server.headers = self.headers
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def served():
    """A page on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Page)
    server.text, server.status = "", 200
    server.url = f"http://127.0.0.1:{server.server_port}/servers"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


# -- a list of servers -----------------------------------------------------------------------------


def looks(servers, times=2):
    """What it takes for a change to be believed."""
    return [[handle.url for handle in servers.look()] for _ in range(times)][-1]


def test_a_file_lists_servers_line_by_line_each_once(tmp_path):
    file = tmp_path / "servers.txt"
    file.write_text(
        "# by the operator\nhttp://127.0.0.1:1/  # the first\n\nlocalhost:1\nLOCALHOST:1\n"
        "http://127.0.0.1:2\n127.0.0.1:2"
    )
    assert looks(ServerList(str(file))) == ["http://127.0.0.1:1", "http://127.0.0.1:2"]


@pytest.mark.parametrize(
    ("one", "two", "are_one"),
    [
        ("http://localhost:1", "http://127.0.0.1:1", True),
        ("http://localhost:1", "http://127.0.0.1:2", False),
        ("http://localhost:1", "https://LOCALHOST:1", True),
        ("http://10.0.0.1:1", "http://10.0.0.2:1", False),
        ("http://[::1]:1", "http://[0:0:0:0:0:0:0:1]:1", True),
        ("https://localhost/one", "https://localhost/two", False),
    ],
)
def test_a_server_that_is_spelled_in_two_ways_counts_once(tmp_path, one, two, are_one):
    file = tmp_path / "servers.txt"
    file.write_text(f"{one}\n{two}\n")
    found = looks(ServerList(str(file)))
    assert len(found) == 2 - are_one
    file.write_text(f"{two}\n")
    assert len(looks(ServerList(str(file)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "::1:30000",
        "[::1:30000",
        "https://h:abc",
        "https://h:99999",
        "h:1, h:2",
        "http://:1",
        "a b:1",
    ],
)
def test_a_line_that_is_no_address_does_not_end_the_run_but_is_told(tmp_path, caplog, line):
    (tmp_path / "good").write_text("127.0.0.1:30000")
    servers = ServerList(str(tmp_path))
    looks(servers)
    (tmp_path / "typo").write_text(line)
    assert looks(servers, 3) == ["http://127.0.0.1:30000"]
    assert (
        f"a line of typo must be one address (http://host:30000, http://[::1]:30000), got {line!r}"
        in (caplog.text)
    )


def test_a_list_may_begin_with_the_mark_that_editors_of_windows_write(tmp_path, served):
    file = tmp_path / "servers.txt"
    file.write_bytes(b"\xef\xbb\xbfhttp://h:1\r\nh:2\r\n")
    assert looks(ServerList(str(file))) == ["http://h:1", "http://h:2"]


def test_names_of_one_address_may_be_servers_behind_a_gateway():
    assert may_be_one("node1", "node1.cluster.lan")
    assert may_be_one("10.0.0.1", "node1")
    assert not may_be_one("first.example.org", "second.example.org")


def test_a_folder_lists_the_servers_of_its_files(tmp_path):
    servers = ServerList(str(tmp_path))
    assert looks(servers) == []
    for name, text in {"b": "h:2\n", "a": "h:1", ".nfs01": "h:3\n", "begun": ""}.items():
        (tmp_path / name).write_text(text)
    assert looks(servers) == ["http://h:1", "http://h:2"]
    (tmp_path / "a").unlink()
    assert looks(servers) == ["http://h:2"]


@pytest.mark.parametrize("bad", [b"h:\n", b"\xff\xfe", None])
def test_a_bad_file_of_a_folder_is_skipped_by_name_and_the_others_are_followed(
    tmp_path, caplog, bad
):
    (tmp_path / "a").write_text("h:1")
    (tmp_path / "typo").write_text("h:2")
    servers = ServerList(str(tmp_path))
    assert looks(servers) == ["http://h:1", "http://h:2"]
    for name in ("typo", "worse"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir() if bad is None else (tmp_path / name).write_bytes(bad)
    (tmp_path / "a").unlink()
    (tmp_path / "new").write_text("h:3")
    assert looks(servers, 4) == ["http://h:2", "http://h:3"]  # it may be being written
    assert [r.message.split(" of ")[0] for r in caplog.records] == ["typo", "worse"]
    if bad is not None:
        (tmp_path / "typo").write_text("h:4")
        assert looks(servers, 4) == ["http://h:3", "http://h:4"]
    assert len(caplog.records) == 2


@pytest.mark.parametrize("text", ['["h:1", "http://h:2/"]', "h:1\nh:2\n"])
def test_a_url_lists_servers_as_json_or_in_lines(served, text):
    served.text = text
    assert looks(ServerList(served.url)) == ["http://h:1", "http://h:2"]
    assert served.headers.get("Authorization") is None


def test_a_change_counts_once_two_looks_in_a_row_have_shown_it(tmp_path):
    file = tmp_path / "servers.txt"
    file.write_text("h:30000\nh:30001\n")
    servers = ServerList(str(file))
    assert looks(servers, 1) == []
    both = looks(servers, 1)
    file.write_text("")  # as an editor that begins to write
    assert looks(servers, 1) == both
    file.write_text("h:30000\nh:30001\n")
    assert looks(servers, 1) == both
    file.write_text("h:30000\nh:3000")
    assert looks(servers, 1) == both
    file.write_text("h:30000\nh:30001\nh:30002\n")
    assert looks(servers, 1) == both
    assert looks(servers, 1) == [*both, "http://h:30002"]
    for _ in range(4):
        file.write_text("h:30000\n")
        assert len(looks(servers, 1)) == 3
        file.write_text("h:30000\nh:30001\nh:30002\n")
        assert len(looks(servers, 1)) == 3


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("missing", "No such file or directory"),
        ("no list", "a line must carry a port"),
        ("not text", "it is not text in UTF-8"),
        ("endless", "a line must"),
        ("an error", "it answers 502 Bad Gateway"),
        ("another page", "a line must"),
    ],
)
def test_a_list_that_can_not_be_read_keeps_its_last_servers_and_says_so_once(
    tmp_path, served, caplog, how, why
):
    file = tmp_path / "servers.txt"
    served.text = good = "h:1\nh:2\n"
    file.write_text(good)
    servers = ServerList(served.url if how in ("an error", "another page") else str(file))
    before = looks(servers)
    if how == "missing":
        file.unlink()
    elif how == "no list":
        file.write_text("h:1\nh:\n")
    elif how == "endless":
        file.write_text("[" * 100_000)
    elif how == "not text":
        file.write_bytes(b"\xff\xfe")
    elif how == "an error":
        served.status = 502
    else:
        served.text = "<html><body>Please log in</body></html>"
    assert looks(servers, 4) == before == ["http://h:1", "http://h:2"]
    assert caplog.text.count("can't be read, so its last servers are kept") == 1
    assert why in caplog.text
    file.write_text("h:2\n")
    served.text, served.status = "h:2\n", 200
    assert looks(servers) == ["http://h:2"]
    assert caplog.text.count("is read again") == 1


def test_a_run_begins_with_the_listed_servers_that_answer(fake, tmp_path):
    file = tmp_path / "servers.txt"
    file.write_text(f"127.0.0.1:9\n{fake.url}\n")
    servers = ServerList(str(file))
    assert [h.url for h in servers.start("model", tmp_path)] == [fake.url]
    assert servers.describe() == f"listed in {file}, http://127.0.0.1:9\n{fake.url}"
    assert not servers.can_restart
    servers.stop()


@pytest.mark.anyio
async def test_a_silent_server_holds_up_no_run_whose_others_answer():
    async def silent():
        await asyncio.Event().wait()

    async def answering(status):
        return HttpAnswer(status)

    asked = {"a": silent(), "b": answering(503), "c": answering(200), "d": silent()}
    found = await answers_soon(asked)
    assert {name: said and said.status for name, said in found.items()} == {
        **{"a": None, "b": 503, "c": 200, "d": None}
    }


def test_the_password_of_a_list_is_asked_with_and_shown_nowhere(served, tmp_path, caplog):
    served.status = 502
    url = served.url.replace("http://", "http://me:s3cret@")
    servers = ServerList(url, connect_timeout_s=0.1)
    with pytest.raises(ServerStartError, match=r"No server of http://me:\*\*\*@127") as error:
        servers.start("model", tmp_path)
    assert served.headers["Authorization"].startswith("Basic ")
    with pytest.raises(ConfigError, match="`source` must be") as refusal:
        ServerList("s3://me:s3cret@bucket")
    said = f"{error.value}{refusal.value}{servers.describe()}{servers.listed_in}{caplog.text}"
    assert "s3cret" not in said


def test_a_run_waits_for_the_first_server_to_be_listed(fake, tmp_path, caplog):
    servers = ServerList(str(tmp_path / "servers"), connect_timeout_s=20)
    starting = threading.Thread(target=servers.start, args=("model", tmp_path))
    starting.start()
    wait_for(lambda: "waiting up to 20 s for a server of" in caplog.text)
    (tmp_path / "servers").write_text(fake.url)
    starting.join()
    assert fake.calls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("", "it names none"),
        ("127.0.0.1:9", "http://127.0.0.1:9 answers nothing"),
        ("node1", "a line must carry a port"),
    ],
)
def test_a_list_without_a_server_that_answers_is_told_in_the_end(tmp_path, text, message):
    file = tmp_path / "servers.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ServerStartError, match=rf"No server of {file} answers after .*{message}"):
        ServerList(str(file), connect_timeout_s=0.2).start("model", tmp_path)


def test_the_wait_for_a_server_can_be_broken_off(tmp_path, caplog):
    servers = ServerList(str(tmp_path), connect_timeout_s=3600)
    failed = []

    def start():
        try:
            servers.start("model", tmp_path)
        except ServerStartError as error:
            failed.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    wait_for(lambda: "waiting up to 3600 s" in caplog.text)
    servers.stop()
    starting.join()
    assert failed


def test_a_listed_server_that_wants_another_key_is_told_at_once(fake, tmp_path):
    fake.api_key = "right"
    (tmp_path / "a").write_text(fake.url)
    with pytest.raises(ConfigError, match=f"{fake.url} wants an API key"):
        ServerList(str(tmp_path)).start("model", tmp_path)
    assert ServerList(str(tmp_path), api_key="right").start("model", tmp_path)


@pytest.mark.parametrize("given", ["", " ", None, ["h:1"], "s3://bucket/servers", "file:///a"])
def test_a_list_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match="`source` must be a file, a folder or a URL"):
        ServerList(given)


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
