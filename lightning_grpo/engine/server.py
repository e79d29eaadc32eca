"""SGLang's HTTP endpoints over the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from lightning_grpo.engine.errors import BadRequestError, WeightUpdateError
from lightning_grpo.engine.intake import Intake
from lightning_grpo.engine.loop import EngineThread
from lightning_grpo.engine.protocol import (
    AbortBody,
    DestroyGroupBody,
    DiskUpdateBody,
    DistributedUpdateBody,
    GenerateBody,
    Generation,
    InitGroupBody,
    PauseBody,
    VersionBody,
    decode,
)
from lightning_grpo.engine.replies import generate_reply
from lightning_grpo.engine.request import Output, Request
from lightning_grpo.engine.updates import WeightUpdates

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SGLANG_VERSION = "0.5.19"
"""The version whose API this is."""

_MAX_BODY = 1 << 28


@dataclass(frozen=True)
class ServerInfo:
    """What `/server_info` and `/model_info` say that never changes.

    Attributes:
        tokenizer_path: Where the tokenizer came from.
        model_type: As the model's config says.
        architectures: As the model's config says.
        max_running_requests: Most requests in slots.
        max_total_tokens: Tokens that the slots may hold.
        deterministic: Whether runs repeat bit for bit.
    """

    tokenizer_path: str
    model_type: str
    architectures: list[str]
    max_running_requests: int
    max_total_tokens: int
    deterministic: bool


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def _error(message: str, status: int) -> web.Response:
    return _json({"error": {"message": message}}, status)


def _refusal(error: BadRequestError | WeightUpdateError | web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPException):
        return _error(error.text or error.reason, error.status)
    message = str(error)
    if isinstance(error, WeightUpdateError):
        return _json({"success": False, "message": message, "error": {"message": message}}, 400)
    return _error(message, 400)


class EngineServer:
    """The HTTP side: parses, checks, hands over to the engine and words the reply.

    Args:
        engine: Generates.
        updates: Changes the weights.
        intake: Checks generation requests.
        info: What it says of itself.
        api_key: The bearer token to ask for; None asks for none.
    """

    def __init__(
        self,
        engine: EngineThread,
        updates: WeightUpdates,
        intake: Intake,
        info: ServerInfo,
        api_key: str | None = None,
    ) -> None:
        self._engine = engine
        self._updates = updates
        self._intake = intake
        self._info = info
        self._api_key = api_key
        self._started = time.time()

    def app(self) -> web.Application:
        """The application with every route."""
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY)
        both: dict[str, Handler] = {
            "/health": self._health,
            "/health_generate": self._health_generate,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/v1/loads": self._loads,
            "/flush_cache": self._flush_cache,
        }
        for path, handler in both.items():
            app.router.add_get(path, handler)
        posts: dict[str, Handler] = {
            "/generate": self._generate,
            "/flush_cache": self._flush_cache,
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/update_weights_from_disk": self._update_from_disk,
            "/init_weights_update_group": self._init_group,
            "/update_weights_from_distributed": self._update_from_distributed,
            "/destroy_weights_update_group": self._destroy_group,
            "/update_weight_version": self._update_version,
        }
        for path, handler in posts.items():
            app.router.add_post(path, handler)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._authorized(request):
            return _error("Unauthorized", 401)
        try:
            return await handler(request)
        except (BadRequestError, WeightUpdateError, web.HTTPException) as error:
            return _refusal(error)
        except Exception:
            # One request's fault must not end the others; it is logged with its traceback.
            logger.exception("%s %s failed", request.method, request.path)
            return _error("internal error, see the engine's log", 500)

    def _authorized(self, request: web.Request) -> bool:
        if self._api_key is None or request.path.startswith("/health"):
            return True
        return request.headers.get("Authorization") == f"Bearer {self._api_key}"

    # ---- generation ----------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        body = decode(await request.read(), GenerateBody)
        generations, is_list = self._intake.generations(body)
        if body.stream:
            return await self._stream(request, generations, is_list, started)
        outputs = await self._run(generations)
        replies = [
            generate_reply(g, output, self._intake.tokenizer, started)
            for g, output in zip(generations, outputs, strict=True)
        ]
        return _json(replies if is_list else replies[0])

    async def _run(self, generations: list[Generation]) -> list[Output]:
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Output]] = [loop.create_future() for _ in generations]

        def listener(future: asyncio.Future[Output]) -> Callable[[Output], None]:
            return lambda output: None if future.done() else future.set_result(output)

        requests = [Request(g, listener(f)) for g, f in zip(generations, futures, strict=True)]
        await self._engine.call(lambda s: s.submit(requests))
        try:
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
        updates: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

        def listener(index: int) -> Callable[[Output], None]:
            return lambda output: updates.put_nowait((index, output))

        requests = [Request(g, listener(i), stream=True) for i, g in enumerate(generations)]
        await self._engine.call(lambda s: s.submit(requests))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        running = len(generations)
        try:
            await response.prepare(request)
            while running:
                index, output = await updates.get()
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

    async def _abort(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), AbortBody)
        if not body.abort_all and body.rid is None:
            raise BadRequestError("`rid` must be given unless `abort_all` is true")
        await self._engine.call(lambda s: s.abort(None if body.abort_all else [body.rid or ""]))
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), PauseBody)
        await self._engine.call(lambda s: s.pause(body.mode))
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        decode(await request.read(), dict)
        await self._engine.call(lambda s: s.resume())
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, _: web.Request) -> web.Response:
        if await self._engine.call(lambda s: s.flush()):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Flush cache failed.\n", status=400)

    # ---- weights -------------------------------------------------------------------------------

    async def _update_from_disk(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), DiskUpdateBody)
        await self._updates.from_disk(body)
        message = _worded("Succeeded to update model weights.", body.weight_version)
        return _json({"success": True, "message": message, "num_paused_requests": 0})

    async def _init_group(self, request: web.Request) -> web.Response:
        await self._updates.init_group(decode(await request.read(), InitGroupBody))
        return _json({"success": True, "message": "Succeeded to initialize custom process group."})

    async def _update_from_distributed(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), DistributedUpdateBody)
        await self._updates.from_distributed(body)
        message = _worded("Succeeded to update parameter online.", body.weight_version)
        return _json({"success": True, "message": message})

    async def _destroy_group(self, request: web.Request) -> web.Response:
        await self._updates.destroy_group(decode(await request.read(), DestroyGroupBody))
        return _json({"success": True, "message": "Succeeded to destroy custom process group."})

    async def _update_version(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), VersionBody)
        if body.abort_all_requests:
            await self._engine.call(lambda s: s.abort(None))
        await self._engine.call(lambda s: s.set_version(body.new_version))
        return _json(
            {
                "success": True,
                "message": f"Weight version updated to {body.new_version}",
                "new_version": body.new_version,
            }
        )

    # ---- what it is ----------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, _: web.Request) -> web.Response:
        if not await self._engine.call(lambda s: s.paused):
            body = decode(
                b'{"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}', GenerateBody
            )
            await self._run(self._intake.generations(body)[0])
        return web.Response()

    async def _model_info(self, _: web.Request) -> web.Response:
        version = await self._engine.call(lambda s: s.weight_version)
        return _json(
            {
                "model_path": self._updates.model_path,
                "served_model_name": self._updates.model_path,
                "tokenizer_path": self._info.tokenizer_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": version,
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": self._info.model_type,
                "architectures": self._info.architectures,
            }
        )

    async def _server_info(self, _: web.Request) -> web.Response:
        state = await self._engine.call(
            lambda s: {
                "weight_version": s.weight_version,
                "paused": s.paused,
                "num_running_reqs": s.num_running,
                "num_waiting_reqs": s.num_waiting,
                "tokens_sampled": s.tokens_sampled,
            }
        )
        return _json(
            {
                "engine": "lightning_grpo embedded CPU engine (SGLang's API, not SGLang)",
                "version": SGLANG_VERSION,
                "model_path": self._updates.model_path,
                "served_model_name": self._updates.model_path,
                "tokenizer_path": self._info.tokenizer_path,
                "device": "cpu",
                "dtype": "float32",
                "context_length": self._intake.context_length,
                "vocab_size": self._intake.vocab_size,
                "max_running_requests": self._info.max_running_requests,
                "max_total_num_tokens": self._info.max_total_tokens,
                "max_req_input_len": self._intake.context_length - 1,
                "enable_deterministic_inference": self._info.deterministic,
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
            "max_total_num_tokens": self._info.max_total_tokens,
        }
        return _json({"timestamp": time.time(), "version": SGLANG_VERSION, "loads": [load]})


def _worded(message: str, version: str | None) -> str:
    return message if version is None else f"{message} Weight version updated to {version}."
