"""An inference server that speaks SGLang's HTTP API on a real socket, with faults on demand.

Its model is a table: the logits of the next token given the last one. So it generates and scores
exactly as its weights say, and a test can tell which weights it holds. It runs on the test's own
event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.fakes.listening import listen, stop_accepting

VOCAB = 16
Table = list[list[float]]


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition at which nothing rings."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - any condition at all
            await asyncio.sleep(0.005)


def make_table(seed: int, vocab: int = VOCAB) -> Table:
    """Logits `[last token][next token]`."""
    noise = random.Random(seed)
    return [[noise.gauss(0.0, 1.0) for _ in range(vocab)] for _ in range(vocab)]


def log_softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [x / temperature for x in row]
    top = max(scaled)
    total = top + math.log(sum(math.exp(x - top) for x in scaled))
    return [x - total for x in scaled]


def table_scores(table: Table, ids: list[int]) -> list[float]:
    """What `/generate` answers for a prompt of these ids, first entry 0."""
    return [0.0] + [log_softmax(table[a])[b] for a, b in itertools.pairwise(ids)]


@dataclass
class Fault:
    """What goes wrong the next `times` times that `path` is called.

    Kinds: `error` (500), `refuse` (400, success false), `lie` (success false, done nevertheless),
    `ignore` (success true, nothing done), `hang`, `die` (the socket closes for good), `drop` (this
    connection breaks), `busy` (`status`, with `retry_after` if given), `drip` (headers at once, and
    then byte after byte), `drip headers`.
    """

    path: str
    kind: str
    times: int = 1
    status: int = 503
    retry_after: str | None = None


@dataclass
class FakeServer:
    """Scripted through its fields; `calls` lists the paths in order."""

    version: str = "0.5.19"
    table: Table = field(default_factory=lambda: make_table(0))
    label: str = "default"
    token_delay_s: float = 0.0
    seed: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    tokens: list[int] | None = None
    lacks: tuple[str, ...] = ()
    faults: list[Fault] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    api_key: str | None = None
    end_token: int | None = None
    drop_last_logprob_of_aborted: bool = False
    abort_hides_the_end: bool = False
    check_before_pause: bool = False
    spoil: Callable[[dict[str, Any]], object] | None = None
    spoil_scores: Callable[[dict[str, Any]], object] | None = None
    most_running: int | None = None
    pid: int | None = None
    tail: str = ""

    def __post_init__(self) -> None:
        self.noise = random.Random(self.seed)
        self.port = 0
        self.aborted: set[str] = set()
        self.running: dict[str, dict[str, Any]] = {}
        self.held_check = False
        self.released = False
        self.in_session = False
        self.group: Any = None
        self.unpaused = asyncio.Event()
        self.unpaused.set()
        self._runner: web.AppRunner | None = None
        self._listener: socket.socket | None = None
        self._hangs = asyncio.Event()

    # What the pool calls a handle.
    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_tail(self) -> str:
        return self.tail

    @property
    def paused(self) -> bool:
        return not self.unpaused.is_set()

    def scores(self, ids: list[int]) -> list[float]:
        return table_scores(self.table, ids)

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.kill()

    async def start(self) -> None:
        app = web.Application(middlewares=[self._faulty])
        routes = {
            "/health": self._health,
            "/model_info": self._model_info,
            "/server_info": self._server_info,
        }
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        for path in (
            "generate abort_request pause_generation continue_generation flush_cache"
            " update_weight_version update_weights_from_disk init_weights_update_group"
            " update_weights_from_distributed destroy_weights_update_group begin_weight_update"
            " end_weight_update release_memory_occupation resume_memory_occupation tokenize"
        ).split():
            if path in self.lacks:
                continue
            app.router.add_post(f"/{path}", getattr(self, f"_{path}"))
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        self._listener = listen(self.port)
        await web.SockSite(self._runner, self._listener).start()
        self.port = self._listener.getsockname()[1]

    async def kill(self) -> None:
        """Closes the socket and every connection, as when the process dies."""
        self._hangs.set()
        self.group = None
        if self._runner is not None:
            runner, self._runner = self._runner, None
            assert self._listener is not None
            await stop_accepting(self._listener)
            if runner.server is not None:
                for connection in list(runner.server.connections):
                    if connection.transport is not None:
                        connection.transport.abort()
            await runner.cleanup()

    @web.middleware
    async def _faulty(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        if request.method == "OPTIONS":  # only asks whether there is such a path
            return await handler(request)
        self.calls.append(request.path)
        return await self._answer_or_fail(request, handler)

    async def _answer_or_fail(self, request: web.Request, handler: Any) -> web.StreamResponse:
        fault = next((f for f in self.faults if f.path == request.path and f.times > 0), None)
        if fault is None:
            return await handler(request)
        fault.times -= 1
        special = {"busy": self._put_off, "drip": self._drip, "drip headers": self._drip}
        if fault.kind in special:
            return await special[fault.kind](request, fault)
        return await self._fail(fault.kind, request, handler)

    async def _put_off(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        headers = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
        error = {"error": {"message": "the queue is full"}}
        return web.json_response(error, status=fault.status, headers=headers)

    async def _drip(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        if fault.kind == "drip headers":
            text = b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100_000
        else:
            text = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 100_000
        for i in range(len(text)):
            if self._hangs.is_set() or request.transport is None:
                break
            request.transport.write(text[i : i + 1])
            await asyncio.sleep(0.01)
        return web.Response()

    async def _fail(  # noqa: PLR0911 - one return for each kind
        self, kind: str, request: web.Request, handler: Any
    ) -> web.StreamResponse:
        if kind == "error":
            return web.Response(status=500, text="Internal Server Error")
        if kind == "refuse":
            return web.json_response({"success": False, "message": "refused"}, status=400)
        if kind == "lie":
            await handler(request)
            return web.json_response({"success": False, "message": "cache not flushed"}, status=400)
        if kind == "ignore":
            self.label = (await request.json()).get("weight_version") or self.label
            return web.json_response({"success": True, "message": ""})
        if kind == "hang":
            await self._hangs.wait()
        if kind == "die":
            killing = asyncio.get_running_loop().create_task(self.kill())
            await asyncio.shield(killing)
        assert request.transport is not None or kind in ("die", "hang")
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        # SGLang has a token sampled, which it does not do while it is paused.
        return web.Response(status=503 if self.paused else 200)

    async def _model_info(self, request: web.Request) -> web.Response:
        said = {"model_path": "fake", "weight_version": self.label}
        return web.json_response(said | self.model)

    async def _tokenize(self, request: web.Request) -> web.Response:
        if self.tokens is None:
            return web.json_response({"error": {"message": "no tokenizer"}}, status=400)
        return web.json_response({"tokens": self.tokens, "count": len(self.tokens)})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"version": self.version, "tp_size": 1, "dtype": "float32", **self.info}
        )

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not (body["input_ids"] and isinstance(body["input_ids"][0], list)):
            return await self._answer(body)
        each = [dict(zip(body, values, strict=True)) for values in zip(*body.values(), strict=True)]
        answers = await asyncio.gather(*(self._answer(one) for one in each))
        return web.json_response([json.loads(answer.text or "") for answer in answers])

    async def _answer(self, body: dict[str, Any]) -> web.Response:
        self.requests.append(body)
        params = body["sampling_params"]
        if max(body["input_ids"]) >= VOCAB:
            return web.json_response({"error": {"message": "id out of range"}}, status=400)
        await self.unpaused.wait()
        assert not self.released
        if params["max_new_tokens"] == 0:
            return self._scored(body)
        rid = body["rid"]
        if self.most_running is not None and len(self.running) >= self.most_running:
            return web.json_response({"error": {"message": "queue is full"}}, status=503)
        self.running[rid] = body
        try:
            return await self._sampled(body, rid, params)
        finally:
            self.running.pop(rid, None)
            self.aborted.discard(rid)

    def _scored(self, body: dict[str, Any]) -> web.Response:
        ids = body["input_ids"]
        scores = self.scores(ids)
        entries = [[None if t == 0 else scores[t], i, None] for t, i in enumerate(ids)]
        meta = {"finish_reason": {"type": "length"}, "input_token_logprobs": entries}
        reply = {"output_ids": [], "meta_info": meta}
        if self.spoil_scores is not None:
            self.spoil_scores(reply)
        return web.json_response(reply)

    async def _sampled(self, body: dict[str, Any], rid: str, params: Any) -> web.Response:
        last = body["input_ids"][-1]
        ids: list[int] = []
        entries: list[Any] = []
        labels: list[str] = []
        finish = "length"
        while len(ids) < params["max_new_tokens"]:
            if rid in self.aborted:
                finish = "abort"
                break
            logprobs = log_softmax(self.table[last], params["temperature"] or 1.0)
            last = self.noise.choices(range(VOCAB), [math.exp(x) for x in logprobs])[0]
            ids.append(last)
            entries.append([logprobs[last], last, None])
            labels.append(self.label)
            if last == self.end_token:
                at_limit = len(ids) == params["max_new_tokens"]  # then SGLang says "length"
                finish = "abort" if self.abort_hides_the_end else "length" if at_limit else "stop"
                break
            await asyncio.sleep(self.token_delay_s)
        if finish == "abort" and self.drop_last_logprob_of_aborted:
            entries = entries[:-1]
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": {"type": finish},
            "weight_version": self.label,
            "output_token_logprobs": entries,
        }
        if self.version >= "0.5.19":
            meta["weight_versions"] = spans_of(labels)
        reply = {"output_ids": ids, "meta_info": meta}
        if self.spoil is not None:
            self.spoil(reply)
        return web.json_response(reply)

    async def _abort_request(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.aborted.update(self.running if body["abort_all"] else {body["rid"]})
        self.held_check = False
        return web.Response()

    async def _pause_generation(self, request: web.Request) -> web.Response:
        self.unpaused.clear()
        self.held_check = self.check_before_pause
        return web.json_response({"status": "ok"})

    async def _continue_generation(self, request: web.Request) -> web.Response:
        self.unpaused.set()
        return web.json_response({"status": "ok"})

    async def _flush_cache(self, request: web.Request) -> web.Response:
        return web.Response(status=400 if self.running or self.held_check else 200)

    async def _release_memory_occupation(self, request: web.Request) -> web.Response:
        assert self.paused
        assert not self.running
        self.released, self.table = True, make_table(-1)
        return web.json_response(None)

    async def _resume_memory_occupation(self, request: web.Request) -> web.Response:
        assert self.released
        self.released = False
        return web.json_response(None)

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["abort_all_requests"] is False
        self.label = body["new_version"]
        return web.json_response({"success": True, "message": ""})

    async def _update_weights_from_disk(self, request: web.Request) -> web.Response:
        from safetensors.numpy import load_file

        body = await request.json()
        assert not self.running
        assert not self.released
        path = Path(body["model_path"])
        if not (path / "model.safetensors").exists():
            return web.json_response({"success": False, "message": "no such folder"}, status=400)
        self.table = load_file(path / "model.safetensors")["table"].tolist()
        self.label = body["weight_version"]
        return web.json_response({"success": True, "message": "Succeeded"})

    async def _begin_weight_update(self, request: web.Request) -> web.Response:
        if self.in_session:
            message = "a weight update is already in progress"
            return web.json_response({"success": False, "message": message}, status=400)
        self.in_session = True
        return web.json_response({"success": True, "message": ""})

    async def _end_weight_update(self, request: web.Request) -> web.Response:
        self.in_session = False
        return web.json_response({"success": True, "message": ""})

    async def _init_weights_update_group(self, request: web.Request) -> web.Response:
        from tests.fakes.weight_group import join_group

        self.group = await asyncio.to_thread(join_group, await request.json())
        return web.json_response({"success": True, "message": ""})

    async def _destroy_weights_update_group(self, request: web.Request) -> web.Response:
        self.group = None
        return web.json_response({"success": True, "message": ""})

    async def _update_weights_from_distributed(self, request: web.Request) -> web.Response:
        from tests.fakes.weight_group import receive

        body = await request.json()
        if self.version >= "0.5.20" and not self.in_session:
            message = "must run between begin_weight_update() and end_weight_update()"
            return web.json_response({"success": False, "message": message}, status=400)
        tensors = await asyncio.to_thread(receive, self.group, body)
        if "table" in tensors:
            self.table = tensors["table"].tolist()
        self.label = body.get("weight_version") or self.label
        return web.json_response({"success": True, "message": "Succeeded"})


def spans_of(labels: list[str]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for position, label in enumerate(labels):
        if not spans or spans[-1]["version"] != label:
            spans.append({"version": label, "start": position, "end": position})
        spans[-1]["end"] = position + 1
    return spans
