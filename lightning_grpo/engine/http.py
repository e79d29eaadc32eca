"""The engine's HTTP server."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from aiohttp import web
from typing_extensions import override

from lightning_grpo.engine.admission import Admission
from lightning_grpo.engine.intake import Intake
from lightning_grpo.engine.openai import OpenAIRoutes
from lightning_grpo.engine.replies import About, Unread, generate_reply, json_response
from lightning_grpo.engine.requests import (
    MAX_BODY_BYTES,
    AbortBody,
    BadRequestError,
    DestroyGroupBody,
    DiskUpdateBody,
    DistributedUpdateBody,
    GenerateBody,
    Generation,
    InitGroupBody,
    Output,
    PauseBody,
    Request,
    TokenizeBody,
    VersionBody,
    WeightUpdateError,
    decode,
)
from lightning_grpo.engine.scheduler import EngineThread
from lightning_grpo.engine.updates import WeightUpdates
from lightning_grpo.keys import bears

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
        intake: Checks generation requests.
        about: What it says of itself.
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
        about: About,
        api_key: str | None = None,
    ) -> None:
        self._engine = engine
        self._updates = updates
        self._intake = intake
        self._about = about
        self._api_key = api_key
        self._tasks: set[asyncio.Task[None]] = set()
        self._admission = Admission()

    def app(self) -> web.Application:
        """The application with every route."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        both: dict[str, Handler] = {
            "/health": self._health,
            "/health_generate": self._health_generate,
            "/model_info": self._about.model_info,
            "/get_model_info": self._about.model_info,
            "/server_info": self._about.server_info,
            "/get_server_info": self._about.server_info,
            "/v1/loads": self._about.loads,
            "/flush_cache": self._flush_cache,
        }
        for path, handler in both.items():
            app.router.add_get(path, handler)
        posts: dict[str, Handler] = {
            "/generate": self._generate,
            "/tokenize": self._tokenize,
            "/flush_cache": self._flush_cache,
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/update_weights_from_disk": self._update_from_disk,
            "/init_weights_update_group": self._init_group,
            "/update_weights_from_distributed": self._update_from_distributed,
            "/destroy_weights_update_group": self._destroy_group,
            "/update_weight_version": self._update_version,
            "/release_memory_occupation": self._release_memory,
            "/resume_memory_occupation": self._resume_memory,
        }
        for path, handler in posts.items():
            app.router.add_post(path, handler)
        OpenAIRoutes(
            self._engine, self._intake, self._admission, lambda: self._updates.model_path
        ).add_to(app)
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

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, _: web.Request) -> web.Response:
        if not await self._engine.call(lambda s: s.paused):
            body = decode(
                b'{"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}', GenerateBody
            )
            await self._run(self._intake.generations(body)[0])
        return web.Response()

    # ---- generation ----------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        body = await self._admission.read(request, GenerateBody)
        generations, is_list = await self._admission.checked(request, self._intake, body)
        with self._admission.room(len(generations)):
            if body.stream:
                return await self._stream(request, generations, is_list, started)
            outputs = await self._run(generations)
        replies = [
            generate_reply(g, output, self._intake.tokenizer, started)
            for g, output in zip(generations, outputs, strict=True)
        ]
        return json_response(replies if is_list else replies[0])

    async def _run(self, generations: list[Generation]) -> list[Output]:
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Output]] = [loop.create_future() for _ in generations]

        def listener(future: asyncio.Future[Output]) -> Callable[[Output], None]:
            return lambda output: None if future.done() else future.set_result(output)

        requests = [Request(g, listener(f)) for g, f in zip(generations, futures, strict=True)]
        try:
            await self._engine.call(lambda s: s.submit(requests))
            return list(await asyncio.gather(*futures))
        except asyncio.CancelledError:
            self._forget(generations)
            raise

    async def _stream(
        self,
        request: web.Request,
        generations: list[Generation],
        is_list: bool,
        started: float,
    ) -> web.StreamResponse:
        unread = Unread()

        def listener(index: int) -> Callable[[Output], None]:
            return lambda output: unread.put(index, output)

        requests = [Request(g, listener(i), stream=True) for i, g in enumerate(generations)]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        running = len(generations)
        try:
            await self._engine.call(lambda s: s.submit(requests))
            await response.prepare(request)
            while running:
                index, output = await unread.get()
                running -= output.finish_reason is not None
                reply = generate_reply(generations[index], output, self._intake.tokenizer, started)
                if is_list:
                    reply["index"] = index
                await response.write(b"data: " + msgspec.json.encode(reply) + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            self._forget(generations)
            raise
        return response

    def _forget(self, generations: list[Generation]) -> None:
        """End what nobody waits for any more."""
        self._engine.post(lambda s: s.abort([g.rid for g in generations]))

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, TokenizeBody)
        tokens = await self._admission.off_loop(
            lambda: self._intake.tokenize(body.prompt, body.add_special_tokens)
        )
        return json_response({"tokens": tokens, "count": len(tokens)})

    async def _abort(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, AbortBody)
        if not body.abort_all and body.rid is None:
            raise BadRequestError("`rid` must be given unless `abort_all` is true")
        await self._engine.call(lambda s: s.abort(None if body.abort_all else [body.rid or ""]))
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, PauseBody)
        await self._engine.call(lambda s: s.pause(body.mode))
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await self._admission.read(request, dict)
        await self._engine.call(lambda s: s.resume())
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, _: web.Request) -> web.Response:
        if await self._engine.call(lambda s: s.flush()):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Flush cache failed.\n", status=400)

    # ---- weights -------------------------------------------------------------------------------

    async def _finish(self, update: Coroutine[Any, Any, None]) -> None:
        """Carry an update through, also when whoever asked for it has gone."""
        task = asyncio.create_task(update)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _update_from_disk(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, DiskUpdateBody)
        await self._finish(self._updates.from_disk(body))
        message = _worded("Succeeded to update model weights.", body.weight_version)
        return json_response({"success": True, "message": message, "num_paused_requests": 0})

    async def _init_group(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, InitGroupBody)
        await self._finish(self._updates.init_group(body))
        return json_response(
            {"success": True, "message": "Succeeded to initialize custom process group."}
        )

    async def _update_from_distributed(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, DistributedUpdateBody)
        await self._finish(self._updates.from_distributed(body))
        return _succeeded(_worded("Succeeded to update parameter online.", body.weight_version))

    async def _destroy_group(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, DestroyGroupBody)
        await self._finish(self._updates.destroy_group(body))
        return json_response(
            {"success": True, "message": "Succeeded to destroy custom process group."}
        )

    async def _release_memory(self, _: web.Request) -> web.Response:
        """Give the cache's memory back; the weights stay, since no trainer waits for their room."""
        if not await self._engine.call(lambda s: s.flush()):
            raise BadRequestError("only an idle engine can give its memory back")
        return json_response(None)

    async def _resume_memory(self, _: web.Request) -> web.Response:
        return json_response(None)  # the cache grows again by itself

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await self._admission.read(request, VersionBody)
        if body.abort_all_requests:
            await self._engine.call(lambda s: s.abort(None))
        await self._engine.call(lambda s: s.set_version(body.new_version))
        return json_response(
            {
                "success": True,
                "message": f"Weight version updated to {body.new_version}",
                "new_version": body.new_version,
            }
        )


def _succeeded(message: str) -> web.Response:
    return json_response({"success": True, "message": message})


def _worded(message: str, version: str | None) -> str:
    return message if version is None else f"{message} Weight version updated to {version}."
