"""Requests that were made to exhaust the engine are refused before anything is made of them."""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import socket
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.fakes.engine_process import EngineProcess

DEEP = b"[" * 30_000 + b"]" * 30_000


def body(**fields: Any) -> bytes:
    return json.dumps({"input_ids": [1], "sampling_params": {}} | fields).encode()


REFUSED = {
    "n": (body(sampling_params={"n": 10**9}), "must be at most 4096, got 1 x 1000000000"),
    "n of each": (body(input_ids=[[1], [2]], sampling_params=[{"n": 1}, {"n": 10**30}]), "2 x"),
    "prompts": (body(input_ids=[[1]] * 10_000), "must be at most 4096, got 10000 x 1"),
    "texts": (body(input_ids=None, text=["a"] * 10_000), "must be at most 4096, got 10000 x 1"),
    "a million prompts": (body(input_ids=[[1]] * 10**6), "at most 65536 lists and objects"),
    "a long text": (body(input_ids=None, text="ab " * 10**6), "the text must fit in the context"),
    "a long prompt": (body(input_ids=[1] * 10**6), "must fit in the context of 2048 tokens"),
    "a long name": (body(rid="r" * 10**6, sampling_params={"n": 4096}), "`rid` must be at most"),
    "a long key": (body(extra_key="r" * 10**6), "`extra_key` must be at most"),
    "stops": (body(sampling_params={"stop": ["a"] * 10**5}), "`sampling_params.stop` must be"),
    "a long stop": (body(sampling_params={"stop": "a" * 10**5}), "`sampling_params.stop` must be"),
    "stop ids": (body(sampling_params={"stop_token_ids": [1] * 10**5}), "at most 512 token ids"),
    "deep JSON": (DEEP, "nested too deeply"),
    "deep in a field": (body().replace(b"{}", b'{"regex": %s}' % DEEP), "nested too deeply"),
    "digits": (body().replace(b"{}", b'{"n": %s}' % (b"9" * 10_000)), "Integer value out of range"),
    "a large value": (body(sampling_params={"regex": ["x" * 10**6] * 5}), "not supported"),
    "bytes": (b"\xff\xfe" * 1000, "must be JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_take_all_memory_is_refused_in_a_short_message(engine, case):
    raw, words = REFUSED[case]
    process = psutil.Process(engine.pid)
    before = process.memory_info().rss
    status, reply = engine.request("/generate", raw=raw)
    message = reply["error"]["message"]
    assert (status, words in message) == (400, True), message
    assert len(message) < 400
    assert process.memory_info().rss - before < 200 << 20


CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
REFUSED_CHATS = {
    "n": (CHAT | {"n": 10**9}, "must be at most 4096"),
    "a long message": (
        CHAT | {"messages": [{"role": "user", "content": "ab " * 10**6}]},
        "must fit in the context",
    ),
    "a template": (
        CHAT | {"chat_template_kwargs": {"chat_template": "{{ 'x' * 10**9 }}"}},
        "must be variables of the model's template, got ['chat_template']",
    ),
    "stops": (CHAT | {"stop": ["a"] * 10**5}, "`sampling_params.stop` must be"),
}


@pytest.mark.parametrize("case", REFUSED_CHATS)
def test_chats_are_bounded_as_well(engine, case):
    chat, words = REFUSED_CHATS[case]
    status, reply = engine.request("/v1/chat/completions", chat)
    message = reply["error"]["message"]
    assert (status, words in message) == (400, True), message
    assert engine.request("/v1/completions", raw=DEEP)[0] == 400


def send(engine: EngineProcess, raw: bytes, *headers: str) -> bytes:
    """The first line of the answer to a POST whose body need not be taken."""
    with connect(engine) as connection:
        lines = ["POST /generate HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(raw)}"]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw)
        return connection.recv(1000).partition(b"\r\n")[0]


def connect(engine: EngineProcess) -> socket.socket:
    at = urlsplit(engine.url)
    return socket.create_connection((at.hostname or "", at.port or 0), timeout=40)


def test_a_body_beyond_the_limit_is_413_also_if_it_is_packed(engine):
    assert b" 413 " in send(engine, body(input_ids=None, text="a" * (20 << 20)))
    packed = gzip.compress(b" " * (40 << 20))
    assert b" 413 " in send(engine, packed, "Content-Encoding: gzip")
    assert engine.get("/model_info")["weight_version"] == "default"


def test_a_hub_id_is_not_looked_up_when_weights_are_updated(engine):
    for path in ("gpt2", "org/model", "/dev/zero", "https://example.org/model"):
        status, reply = engine.request("/update_weights_from_disk", {"model_path": path})
        assert status == 400
        assert "must be a folder of this machine (nothing is fetched)" in reply["message"]


def test_names_of_weights_and_groups_which_every_reply_would_repeat_are_bounded(engine):
    group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    for path, name, others in (
        ("/update_weight_version", "new_version", {}),
        ("/update_weights_from_disk", "weight_version", {"model_path": "nowhere"}),
        ("/update_weights_from_disk", "model_path", {}),
        ("/init_weights_update_group", "group_name", group),
        ("/destroy_weights_update_group", "group_name", {}),
        ("/abort_request", "rid", {}),
    ):
        status, reply = engine.request(path, {**others, name: "v" * 10**6})
        assert status == 400
        assert f"`{name}`: Expected `str` of length <= " in reply["error"]["message"]
        assert len(reply["error"]["message"]) < 250
    assert engine.get("/model_info")["weight_version"] == "default"


IDLE = {
    "half open": b"POST /generate HTTP/1.1\r\nHost: x\r\n",
    "answered": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("said", IDLE.values(), ids=IDLE)
def test_idle_connections_beyond_the_file_limit_are_survived(model_folder, tmp_path, said):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        engine = EngineProcess(model_folder, tmp_path / "log", forked=False)  # it has the limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    idle = []
    try:
        for _ in range(600):
            idle.append(connect(engine))
            idle[-1].sendall(said)
            if said.endswith(b"\r\n\r\n"):
                assert idle[-1].recv(1000).startswith(b"HTTP/1.1 200 ")
        assert engine.generate([1], sampling={"max_new_tokens": 1})
        assert engine.get("/model_info")["weight_version"] == "default"
    finally:
        for each in idle:
            each.close()
        assert engine.close() == 0
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "connections are taken" in line
