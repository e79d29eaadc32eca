"""The engine's HTTP server."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_grpo.engine.intake import Intake
from lightning_grpo.engine.openai import OpenAIRoutes
from lightning_grpo.engine.replies import event_stream, generate_reply, json_response, sampled
from lightning_grpo.engine.requests import (
    MAX_BODY_BYTES,
    AbortBody,
    BadRequestError,
    DestroyGroupBody,
    DiskUpdateBody,
    DistributedUpdateBody,
    GenerateBody,
    InitGroupBody,
    Output,
    PauseBody,
    SamplingBody,
    TokenizeBody,
    VersionBody,
    WeightUpdateError,
)
from lightning_grpo.engine.scheduler import EngineThread, Limits
from lightning_grpo.engine.updates import WeightUpdates
from lightning_grpo.keys import bears

T = TypeVar("T")
logger = logging.getLogger(__name__)


HEAD_S = 15.0
"""A new connection sends its first request within this time, or is closed."""
_SPARE_FILES = 128
"""Beside connections: weights, pipes, and connections accepted in one turn of the loop."""
_ACCEPTED_AT_ONCE = 32
_BACKLOG = 1024
_TOLD_EVERY_S = 60.0


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
        family, kind, _, _, address = (
            await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # asyncio accepts as many in one turn as it is told to let wait.
            server = await loop.create_server(self, sock=listener, backlog=_ACCEPTED_AT_ONCE)
        except BaseException:
            listener.close()
            raise
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
            logger.warning(
                "%s: %d turned away since this was last said (`ulimit -n` sets how many there may "
                "be)",
                *(why, self._turned_away),
            )
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


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SGLANG_VERSION = "0.5.19"
"""The version whose API this is."""
_OPEN = ("/health", "/health_generate")
"""Answered without a key, as SGLang does: they say whether it lives, and change nothing."""


def _error(message: str, status: int) -> web.Response:
    return json_response({"error": {"message": message}}, status)


def _refusal(error: BadRequestError | WeightUpdateError | web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPException):
        answer = _error(error.text or error.reason, error.status)
        if error.status == web.HTTPServiceUnavailable.status_code:
            answer.headers["Retry-After"] = "1"
        return answer
    message = str(error)
    if isinstance(error, WeightUpdateError):
        return json_response(
            {"success": False, "message": message, "error": {"message": message}}, 400
        )
    return _error(message, 400)


class EngineServer:
    """The HTTP side: parses, checks, hands over to the engine and words the reply.

    Args:
        engine: Generates.
        updates: Changes the weights.
        intake: Reads and checks requests.
        limits: How much the engine takes on.
        model: What is served.
        api_key: The bearer token to ask for; None asks for none.

    Attributes:
        door: To be told of each connection's requests; None where nobody bounds connections.
    """

    door: Door | None = None

    def __init__(
        self,
        engine: EngineThread,
        updates: WeightUpdates,
        intake: Intake,
        limits: Limits,
        model: PreTrainedModel,
        api_key: str | None = None,
    ) -> None:
        self._engine = engine
        self._updates = updates
        self._intake = intake
        self._limits = limits
        self._model = model
        self._api_key = api_key
        self._tokenizer_path = updates.model_path
        self._started = time.time()
        self._tasks: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        """The application with every route."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        gets: dict[str, Handler] = {
            "/health": self._health,
            "/health_generate": self._health_generate,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/v1/loads": self._loads,
            "/flush_cache": self._flush_cache,
        }
        for path, handler in gets.items():
            app.router.add_get(path, handler)
        updates, joined = self._updates, "Succeeded to %s custom process group."
        posts: dict[str, Handler] = {
            "/generate": self._generate,
            "/tokenize": self._tokenize,
            "/flush_cache": self._flush_cache,
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/update_weights_from_disk": self._weights(
                *(DiskUpdateBody, updates.from_disk, "Succeeded to update model weights."),
                num_paused_requests=0,
            ),
            "/init_weights_update_group": self._weights(
                InitGroupBody, updates.init_group, joined % "initialize"
            ),
            "/update_weights_from_distributed": self._weights(
                *(DistributedUpdateBody, updates.from_distributed),
                "Succeeded to update parameter online.",
            ),
            "/destroy_weights_update_group": self._weights(
                DestroyGroupBody, updates.destroy_group, joined % "destroy"
            ),
            "/update_weight_version": self._update_version,
            "/release_memory_occupation": self._release_memory,
            "/resume_memory_occupation": self._resume_memory,
        }
        for path, handler in posts.items():
            app.router.add_post(path, handler)
        OpenAIRoutes(self._engine, self._intake, lambda: updates.model_path).add_to(app)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.door is None:
            return await self._answer(request, handler)
        self.door.heard(request.transport)
        try:
            return await self._answer(request, handler)
        finally:
            self.door.answered(request.transport)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._authorized(request):
            refused = _error("Unauthorized", 401)
            refused.force_close()  # a stranger's body is not read, and its connection not kept
            return refused
        try:
            return await handler(request)
        except (BadRequestError, WeightUpdateError, web.HTTPException) as error:
            return _refusal(error)
        except Exception:
            # One request's fault must not end the others; it is logged with its traceback.
            logger.exception("%s %s failed", request.method, request.path)
            return _error("internal error, see the engine's log", 500)

    def _authorized(self, request: web.Request) -> bool:
        if self._api_key is None or request.path in _OPEN:
            return True
        return bears(request.headers.get("Authorization"), self._api_key)

    # ---- what it is ----------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, _: web.Request) -> web.Response:
        if not await self._engine.call(lambda s: s.paused):
            body = GenerateBody(input_ids=[0], sampling_params=SamplingBody(max_new_tokens=1))
            generations, _is_list = self._intake.generations(body)
            async with sampled(self._engine, generations, stream=False) as outputs:
                async for _output in outputs:
                    pass
        return web.Response()

    async def _model_info(self, _: web.Request) -> web.Response:
        return json_response(
            {
                "model_path": self._updates.model_path,
                "served_model_name": self._updates.model_path,
                "tokenizer_path": self._tokenizer_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": await self._engine.call(lambda s: s.weight_version),
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": self._model.config.model_type,
                "architectures": self._model.config.architectures or [type(self._model).__name__],
            }
        )

    async def _server_info(self, _: web.Request) -> web.Response:
        """Of SGLang's keys those that mean something here."""
        state = await self._engine.call(
            lambda s: {
                "weight_version": s.weight_version,
                "paused": s.paused,
                "num_running_reqs": s.num_running,
                "num_waiting_reqs": s.num_waiting,
                "tokens_sampled": s.tokens_sampled,
            }
        )
        return json_response(
            {
                "engine": "lightning_grpo embedded CPU engine (SGLang's API, not SGLang)",
                "version": SGLANG_VERSION,
                "model_path": self._updates.model_path,
                "served_model_name": self._updates.model_path,
                "tokenizer_path": self._tokenizer_path,
                "device": "cpu",
                "dtype": "float32",
                "context_length": self._intake.context_length,
                "vocab_size": self._intake.vocab_size,
                "max_running_requests": self._limits.max_running,
                "max_total_num_tokens": self._limits.max_total_tokens,
                "max_req_input_len": self._intake.context_length - 1,
                "enable_memory_saver": True,
                "enable_deterministic_inference": self._limits.deterministic,
                "tp_size": 1,
                "dp_size": 1,
                "startup_time": self._started,
                "weight_version": state["weight_version"],
                "internal_states": [state],
            }
        )

    async def _loads(self, _: web.Request) -> web.Response:
        running, waiting = await self._engine.call(lambda s: (s.num_running, s.num_waiting))
        load = {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "max_total_num_tokens": self._limits.max_total_tokens,
        }
        return json_response({"timestamp": time.time(), "version": SGLANG_VERSION, "loads": [load]})

    # ---- generation ----------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        body = await self._intake.read(request, GenerateBody)
        generations, is_list = await self._intake.checked(request, body)

        def reply(index: int, output: Output) -> dict[str, Any]:
            said = generate_reply(generations[index], output, self._intake.tokenizer, started)
            return said | {"index": index} if body.stream and is_list else said

        with self._intake.room(len(generations)):
            async with sampled(self._engine, generations, stream=body.stream) as outputs:
                if body.stream:
                    events = (reply(index, output) async for index, output in outputs)
                    return await event_stream(request, events)
                ended = {index: output async for index, output in outputs}
        replies = [reply(index, ended[index]) for index in range(len(generations))]
        return json_response(replies if is_list else replies[0])

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await self._intake.read(request, TokenizeBody)
        tokens = await self._intake.off_loop(
            lambda: self._intake.tokenize(body.prompt, body.add_special_tokens)
        )
        return json_response({"tokens": tokens, "count": len(tokens)})

    async def _abort(self, request: web.Request) -> web.Response:
        body = await self._intake.read(request, AbortBody)
        if not body.abort_all and body.rid is None:
            raise BadRequestError("`rid` must be given unless `abort_all` is true")
        await self._engine.call(lambda s: s.abort(None if body.abort_all else [body.rid or ""]))
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = await self._intake.read(request, PauseBody)
        await self._engine.call(lambda s: s.pause(body.mode))
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await self._intake.read(request, dict)
        await self._engine.call(lambda s: s.resume())
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, _: web.Request) -> web.Response:
        if await self._engine.call(lambda s: s.flush()):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Flush cache failed.\n", status=400)

    async def _release_memory(self, _: web.Request) -> web.Response:
        """Give the cache's memory back; the weights stay, since no trainer waits for their room."""
        if not await self._engine.call(lambda s: s.flush()):
            raise BadRequestError("only an idle engine can give its memory back")
        return json_response(None)

    async def _resume_memory(self, _: web.Request) -> web.Response:
        return json_response(None)  # the cache grows again by itself

    # ---- weights -------------------------------------------------------------------------------

    def _weights(
        self,
        kind: type[T],
        update: Callable[[T], Coroutine[Any, Any, None]],
        message: str,
        **more: Any,
    ) -> Handler:
        """The handler of an update, which is carried through also when its caller has gone."""

        async def handle(request: web.Request) -> web.Response:
            body = await self._intake.read(request, kind)
            task = asyncio.create_task(update(body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.shield(task)
            version = getattr(body, "weight_version", None)
            named = "" if version is None else f" Weight version updated to {version}."
            return json_response({"success": True, "message": message + named, **more})

        return handle

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await self._intake.read(request, VersionBody)
        if body.abort_all_requests:
            await self._engine.call(lambda s: s.abort(None))
        await self._engine.call(lambda s: s.set_version(body.new_version))
        message = f"Weight version updated to {body.new_version}"
        return json_response({"success": True, "message": message, "new_version": body.new_version})
