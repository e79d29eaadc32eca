"""The engine's HTTP server: connections, and SGLang's endpoints."""

from __future__ import annotations

import asyncio
import base64
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_grpo.engine.batch import Output
from lightning_grpo.engine.requests import (
    MAX_BODY_BYTES,
    AbortBody,
    BadRequestError,
    DestroyGroupBody,
    DiskUpdateBody,
    DistributedUpdateBody,
    GenerateBody,
    InitGroupBody,
    Intake,
    PauseBody,
    SamplingBody,
    TokenizeBody,
    VersionBody,
    WeightUpdateError,
)
from lightning_grpo.engine.scheduler import EngineThread, Limits
from lightning_grpo.engine.updates import WeightUpdates
from lightning_grpo.errors import BusyError, GRPOError
from lightning_grpo.keys import bears

T = TypeVar("T")
logger = logging.getLogger(__name__)

# ---- connections -------------------------------------------------------------------------------

HEAD_S = 15.0
"""A new connection sends its first request within this time, or is closed."""
_SPARE_FILES = 128
"""Beside connections: weights, pipes, and connections accepted in one turn of the loop."""
_ACCEPTED_AT_ONCE = 32
_BACKLOG = 1024
_TOLD_EVERY_S = 60.0
_SHUTDOWN_S = 2.0


def room_for_connections() -> int:
    """How many connections fit under this process's limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if soft == resource.RLIM_INFINITY else soft
    return max(16, most - min(_SPARE_FILES, most // 2))


class Door:
    """Bounds an asyncio server's connections.

    One that never asks is closed after a while, and one that asks for nothing now at once where it
    takes the room of a newcomer; where all are busy the newcomer is closed. That is said once a
    minute.

    Args:
        make: A protocol for each connection.
        room: The most connections.
        head_s: How long a connection may take to send its first request.
    """

    def __init__(
        self, make: Callable[[], asyncio.Protocol], room: int | None = None, head_s: float = HEAD_S
    ) -> None:
        self._make = make
        self._room = room_for_connections() if room is None else room
        self._head_s = head_s
        self._open = 0
        self._silent: dict[asyncio.BaseTransport | None, asyncio.TimerHandle | None] = {}
        self._turned_away, self._told_at = 0, -_TOLD_EVERY_S

    def __call__(self) -> asyncio.Protocol:
        """A connection that is about to be made."""
        return _Guarded(self, self._make())

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Accept connections; also says in one line, not one each, that files have run out."""
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(self._on_exception)
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(
            address, family=family, dualstack_ipv6=family == socket.AF_INET6
        )
        # asyncio accepts as many in one turn as it is told to let wait.
        server = await loop.create_server(self, sock=listener, backlog=_ACCEPTED_AT_ONCE)
        listener.listen(_BACKLOG)
        return server

    def heard(self, transport: asyncio.BaseTransport | None) -> None:
        """A request has come on a connection."""
        timer = self._silent.pop(transport, None)
        if timer is not None:
            timer.cancel()

    def answered(self, transport: asyncio.BaseTransport | None) -> None:
        """Nothing is asked for on a connection now; it may stay while there is room."""
        if transport is not None and not transport.is_closing():
            self._silent[transport] = None

    def admit(self, transport: asyncio.Transport) -> bool:
        """Let a connection in, if there is or can be made room."""
        if self._open >= self._room:
            self._tell(f"all {self._room} connections are taken")
            if not self._silent:
                return False
            self._close(next(iter(self._silent)))  # the oldest
        self._open += 1
        loop = asyncio.get_running_loop()
        self._silent[transport] = loop.call_later(self._head_s, self._close, transport)
        return True

    def gone(self, transport: asyncio.Transport) -> None:
        """A connection that was let in has ended."""
        self._open -= 1
        self.heard(transport)

    def _close(self, transport: asyncio.BaseTransport | None) -> None:
        self.heard(transport)
        assert isinstance(transport, asyncio.Transport)
        transport.abort()

    def _tell(self, why: str) -> None:
        self._turned_away += 1
        now = time.monotonic()
        if now - self._told_at >= _TOLD_EVERY_S:
            since = "turned away since this was last said (`ulimit -n` sets how many there may be)"
            logger.warning("%s: %d %s", why, self._turned_away, since)
            self._turned_away, self._told_at = 0, now

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), OSError) and "socket" in context:
            self._tell(f"a connection can't be accepted ({context['exception']})")
        else:
            loop.default_exception_handler(context)


class _Guarded(asyncio.Protocol):
    """A protocol that is only told of connections that were let in."""

    def __init__(self, door: Door, inner: asyncio.Protocol) -> None:
        self._door, self._inner = door, inner
        self._transport: asyncio.Transport | None = None
        self.data_received = inner.data_received  # type: ignore[method-assign]
        self.eof_received = inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._door.admit(transport):
            transport.abort()
            return
        self._transport = transport
        self._inner.connection_made(transport)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._door.gone(self._transport)
            self._inner.connection_lost(exc)


# ---- replies -----------------------------------------------------------------------------------


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


async def event_stream(request: web.Request, events: AsyncIterator[Any]) -> web.StreamResponse:
    """Answer with server-sent events, each a JSON value, and `[DONE]`."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async for event in events:
        await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def reply_text(output: Output, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of a completion, cut at what stopped it; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    asked, reason, ids = output.request.generation, output.finish_reason, output.token_ids
    matched = None if reason is None or asked.no_stop_trim else reason.get("matched")
    text = str(
        tokenizer.decode(
            ids[:-1] if isinstance(matched, int) else ids,
            skip_special_tokens=asked.skip_special_tokens,
            spaces_between_special_tokens=asked.spaces_between_special_tokens,
        )
    )
    if reason is None:
        # A character whose bytes are not all here is not told of yet.
        return text.rstrip("\ufffd")
    return text.partition(matched)[0] if isinstance(matched, str) else text


def generate_reply(
    output: Output, tokenizer: PreTrainedTokenizerBase | None, started: float
) -> dict[str, Any]:
    """SGLang's reply about a completion whose request came at `started` (`time.perf_counter`)."""
    request, asked, token_ids = output.request, output.request.generation, output.token_ids
    meta: dict[str, Any] = {
        "id": asked.rid,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(asked.input_ids),
        "weight_version": output.weight_version,
        "num_retractions": request.num_retractions,
        "reasoning_tokens": 0,
        "completion_tokens": len(token_ids),
        "cached_tokens": request.cached_tokens,
        "cached_tokens_details": None,
        "dp_rank": None,
        "e2e_latency": time.perf_counter() - started,
        "response_sent_to_client_ts": time.time(),
    }
    if asked.return_logprob:
        # The first of a scored prompt has nothing before it.
        scores = [] if request.input_logprobs is None else [None, *request.input_logprobs]
        meta["input_token_logprobs"] = _entries(scores, asked.input_ids[asked.logprob_start :])
        meta["output_token_logprobs"] = _entries(output.logprobs, token_ids)
        meta["output_token_logprobs_length"] = len(token_ids)
    if output.finish_reason is not None:
        meta["weight_versions"] = output.spans
        if asked.return_routed_experts:
            meta["routed_experts"] = base64.b64encode(output.routes).decode("ascii")
    return {"text": reply_text(output, tokenizer), "output_ids": token_ids, "meta_info": meta}


def _entries(logprobs: Sequence[float | None], token_ids: Sequence[int]) -> list[list[Any]]:
    """SGLang's lists for each token; none without logprobs."""
    return [[value, token, None] for value, token in zip(logprobs, token_ids, strict=False)]


# ---- SGLang's endpoints ------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SGLANG_VERSION = "0.5.19"
"""The version whose API this is."""
_OPEN = ("/health", "/health_generate")
"""Answered without a key, as SGLang does: they say whether it lives, and change nothing."""


def _refusal(error: GRPOError | web.HTTPException) -> web.Response:
    status, message = 503 if isinstance(error, BusyError) else 400, str(error)
    if isinstance(error, web.HTTPException):
        status, message = error.status, error.text or error.reason
    answer: dict[str, Any] = {"error": {"message": message}}
    if isinstance(error, WeightUpdateError):
        answer |= {"success": False, "message": message}
    response = json_response(answer, status)
    if isinstance(error, BusyError):
        response.headers["Retry-After"] = "1"
    if isinstance(error, web.HTTPUnauthorized):
        response.force_close()  # a stranger's body is not read, and its connection not kept
    return response


@dataclass(eq=False)
class EngineServer:
    """SGLang's side of HTTP: has requests read and checked, hands them on and words the reply.

    Attributes:
        api_key: The bearer token to ask for; None asks for none.
        app: With every route; others can be added before it listens.
    """

    engine: EngineThread
    updates: WeightUpdates
    intake: Intake
    limits: Limits
    model: PreTrainedModel
    api_key: str | None

    def __post_init__(self) -> None:
        self._tokenizer_path = self.updates.model_path
        self._started = time.time()
        self._tasks: set[asyncio.Task[None]] = set()
        self.app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        self._add_routes()

    async def listen(self, host: str, port: int) -> tuple[web.AppRunner, asyncio.Server]:
        """Answer at an address.

        Raises:
            OSError: It is taken, or not this machine's.
        """
        runner = web.AppRunner(self.app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        assert runner.server is not None
        self._door = Door(runner.server)
        return runner, await self._door.listen(host, port)

    def _add_routes(self) -> None:
        updates, joined = self.updates, "Succeeded to %s custom process group."
        new = "Succeeded to update model weights."
        online = "Succeeded to update parameter online."
        weights = {
            "/update_weights_from_disk": self._carried_out(
                DiskUpdateBody, updates.from_disk, new, num_paused_requests=0
            ),
            "/update_weights_from_distributed": self._carried_out(
                DistributedUpdateBody, updates.from_distributed, online
            ),
            "/init_weights_update_group": self._carried_out(
                InitGroupBody, updates.init_group, joined % "initialize"
            ),
            "/destroy_weights_update_group": self._carried_out(
                DestroyGroupBody, updates.destroy_group, joined % "destroy"
            ),
        }
        self.app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/health_generate", self._health_generate),
                web.get("/model_info", self._model_info),
                web.get("/get_model_info", self._model_info),
                web.get("/server_info", self._server_info),
                web.get("/get_server_info", self._server_info),
                web.get("/v1/loads", self._loads),
                web.get("/flush_cache", self._flush_cache),
                web.post("/flush_cache", self._flush_cache),
                web.post("/generate", self._generate),
                web.post("/tokenize", self._tokenize),
                web.post("/abort_request", self._abort),
                web.post("/pause_generation", self._pause),
                web.post("/continue_generation", self._continue),
                web.post("/update_weight_version", self._update_version),
                web.post("/release_memory_occupation", self._release_memory),
                web.post("/resume_memory_occupation", self._resume_memory),
                *(web.post(path, handler) for path, handler in weights.items()),
            ]
        )

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._door.heard(request.transport)
        try:
            if not self._authorized(request):
                raise web.HTTPUnauthorized(text="Unauthorized")
            return await handler(request)
        except (BadRequestError, BusyError, WeightUpdateError, web.HTTPException) as error:
            return _refusal(error)
        except Exception:
            # One request's fault must not end the others; it is logged with its traceback.
            logger.exception("%s %s failed", request.method, request.path)
            return _refusal(
                web.HTTPInternalServerError(text="internal error, see the engine's log")
            )
        finally:
            self._door.answered(request.transport)

    def _authorized(self, request: web.Request) -> bool:
        if self.api_key is None or request.path in _OPEN:
            return True
        return bears(request.headers.get("Authorization"), self.api_key)

    # ---- what it is ----------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, _: web.Request) -> web.Response:
        if not await self.engine.call(lambda s: s.paused):
            body = GenerateBody(input_ids=[0], sampling_params=SamplingBody(max_new_tokens=1))
            await self.engine.finish(self.intake.generations(body)[0])
        return web.Response()

    def _paths(self) -> dict[str, str]:
        path = self.updates.model_path
        names = {"model_path": path, "served_model_name": path}
        return names | {"tokenizer_path": self._tokenizer_path}

    async def _model_info(self, _: web.Request) -> web.Response:
        return json_response(
            {
                **self._paths(),
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": await self.engine.call(lambda s: s.weight_version),
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": self.model.config.model_type,
                "architectures": self.model.config.architectures or [type(self.model).__name__],
            }
        )

    async def _server_info(self, _: web.Request) -> web.Response:
        """Of SGLang's keys those that mean something here."""
        state = await self.engine.call(
            lambda s: {
                "weight_version": s.weight_version,
                "paused": s.paused,
                "num_running_reqs": len(s.running),
                "num_waiting_reqs": s.num_waiting,
                "tokens_sampled": s.running.tokens_sampled,
            }
        )
        return json_response(
            {
                "engine": "lightning_grpo embedded CPU engine (SGLang's API, not SGLang)",
                "version": SGLANG_VERSION,
                **self._paths(),
                "device": "cpu",
                "dtype": "float32",
                "context_length": self.intake.context_length,
                "vocab_size": self.intake.vocab_size,
                "max_running_requests": self.limits.max_running,
                "max_total_num_tokens": self.limits.max_total_tokens,
                "max_req_input_len": self.intake.context_length - 1,
                "enable_memory_saver": True,
                "enable_return_routed_experts": self.intake.has_routers,
                "enable_deterministic_inference": self.limits.deterministic,
                "tp_size": 1,
                "dp_size": 1,
                "startup_time": self._started,
                "weight_version": state["weight_version"],
                "internal_states": [state],
            }
        )

    async def _loads(self, _: web.Request) -> web.Response:
        running, waiting = await self.engine.call(lambda s: (len(s.running), s.num_waiting))
        load = {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "max_total_num_tokens": self.limits.max_total_tokens,
        }
        return json_response({"timestamp": time.time(), "version": SGLANG_VERSION, "loads": [load]})

    # ---- generation ----------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        body = await self.intake.read(request, GenerateBody)
        generations, is_list = await self.intake.checked(request, body)

        def reply(output: Output) -> dict[str, Any]:
            return generate_reply(output, self.intake.tokenizer, started)

        if not body.stream:
            replies = [reply(output) for output in await self.engine.finish(generations)]
            return json_response(replies if is_list else replies[0])
        async with self.engine.sample(generations, stream=True) as outputs:
            events = (
                reply(output) | ({"index": index} if is_list else {})
                async for index, output in outputs
            )
            return await event_stream(request, events)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await self.intake.read(request, TokenizeBody)
        tokens = await self.intake.off_loop(
            lambda: self.intake.tokenize(body.prompt, body.add_special_tokens)
        )
        return json_response({"tokens": tokens, "count": len(tokens)})

    async def _abort(self, request: web.Request) -> web.Response:
        body = await self.intake.read(request, AbortBody)
        if not body.abort_all and body.rid is None:
            raise BadRequestError("`rid` must be given unless `abort_all` is true")
        await self.engine.call(lambda s: s.abort(None if body.abort_all else [body.rid or ""]))
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = await self.intake.read(request, PauseBody)
        await self.engine.call(lambda s: s.pause(body.mode))
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await self.intake.read(request, dict)
        await self.engine.call(lambda s: s.resume())
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, _: web.Request) -> web.Response:
        if await self.engine.call(lambda s: s.flush()):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Flush cache failed.\n", status=400)

    async def _release_memory(self, _: web.Request) -> web.Response:
        """Give the cache's memory back; the weights stay, since no trainer waits for their room."""
        if not await self.engine.call(lambda s: s.flush()):
            raise BadRequestError("only an idle engine can give its memory back")
        return json_response(None)

    async def _resume_memory(self, _: web.Request) -> web.Response:
        return json_response(None)  # the cache grows again by itself

    # ---- weights -------------------------------------------------------------------------------

    def _carried_out(
        self,
        kind: type[T],
        update: Callable[[T], Coroutine[Any, Any, None]],
        message: str,
        **more: Any,
    ) -> Handler:
        """The handler of an update, which is carried through also when its caller has gone."""

        async def handle(request: web.Request) -> web.Response:
            body = await self.intake.read(request, kind)
            task = asyncio.create_task(update(body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.shield(task)
            version = getattr(body, "weight_version", None)
            named = "" if version is None else f" Weight version updated to {version}."
            return json_response({"success": True, "message": message + named, **more})

        return handle

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await self.intake.read(request, VersionBody)
        if body.abort_all_requests:
            await self.engine.call(lambda s: s.abort(None))
        await self.engine.call(lambda s: s.set_version(body.new_version))
        message = f"Weight version updated to {body.new_version}"
        return json_response({"success": True, "message": message, "new_version": body.new_version})
