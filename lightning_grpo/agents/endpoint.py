"""`/v1/chat/completions` before the servers, on the event loop of the rollouts.

One server for all episodes that run; each has its own path and key. It opens with the first episode
and closes with the last.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import anyio
from aiohttp import web

from lightning_grpo.agents.conversation import (
    MODEL,
    BadRequest,
    ChatRequest,
    Conversations,
    HistoryError,
    Recorder,
    completion_body,
    completion_events,
    read_request,
)
from lightning_grpo.engine.http import Door, room_for_connections
from lightning_grpo.keys import bears
from lightning_grpo.rollout.workflow import EpisodeContext
from lightning_grpo.types import Sampling

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_MAX_BODY_BYTES = 64 * 2**20


@dataclass
class AgentSession:
    """One episode as its agent sees it.

    Attributes:
        base_url: To give to a client.
        api_key: To give to a client.
        recorder: What was said.
        failure: Why a call failed; the episode fails with it, whatever the agent made of it.
    """

    base_url: str
    api_key: str
    recorder: Recorder
    context: EpisodeContext
    sampling: Sampling
    failure: Exception | None = None
    running: set[asyncio.Task[Any]] = field(default_factory=set)


class Endpoint:
    """Serves the sessions that are open.

    Args:
        sampling: Of every request; a request may only stop earlier.
        conversations: See `Recorder`.
    """

    def __init__(self, sampling: Sampling, conversations: Conversations = "one") -> None:
        self._sampling = sampling
        self._conversations: Conversations = conversations
        self._sessions: dict[str, AgentSession] = {}
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None
        self._listener: asyncio.Server | None = None
        self._url = ""
        self._opening = anyio.Lock()
        self._users = 0
        self._told_ignored = False

    @asynccontextmanager
    async def session(self, context: EpisodeContext) -> AsyncIterator[AgentSession]:
        """A place for one agent; its calls in flight are cancelled on the way out."""
        name = secrets.token_hex(8)
        self._users += 1
        session: AgentSession | None = None
        try:
            url = await self._open()
            recorder = Recorder(context.tokenizer, self._conversations)
            session = AgentSession(
                f"{url}/{name}/v1", secrets.token_hex(16), recorder, context, self._sampling
            )
            self._sessions[name] = session
            yield session
        finally:
            self._sessions.pop(name, None)
            self._users -= 1
            with anyio.CancelScope(shield=True):
                if session is not None:
                    await _cancel(session.running)
                await self._close_unused()

    async def _open(self) -> str:
        async with self._opening:
            if self._runner is None:
                app = web.Application(client_max_size=_MAX_BODY_BYTES)
                app.router.add_post("/{session}/v1/chat/completions", self._chat)
                app.router.add_get("/{session}/v1/models", self._models)
                runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
                await runner.setup()
                assert runner.server is not None
                # The run's other files, connections to servers first, need their room.
                self._door = Door(runner.server, room_for_connections() // 2)
                self._listener = await self._door.listen(_HOST, 0)
                self._runner = runner
                self._url = f"http://{_HOST}:{self._listener.sockets[0].getsockname()[1]}"
            return self._url

    async def _close_unused(self) -> None:
        async with self._opening:
            runner = self._runner
            if not self._users and runner is not None:
                self._runner = None
                if self._listener is not None:
                    self._listener.close()
                await runner.cleanup()
        if not self._users:
            self._opening = anyio.Lock()  # the next use may be on another event loop

    async def _models(self, request: web.Request) -> web.Response:
        self._find(request)
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session = self._find(request)
        task = asyncio.current_task()
        assert task is not None
        session.running.add(task)
        try:
            asked = read_request(await _json(request), session.sampling)
            return await self._answer(request, session, asked)
        except (BadRequest, HistoryError) as error:
            return _refused(session, error, HTTPStatus.BAD_REQUEST)
        except Exception as error:  # noqa: BLE001 - kept, and raised as the episode's failure
            return _refused(session, error, HTTPStatus.INTERNAL_SERVER_ERROR)
        finally:
            session.running.discard(task)

    async def _answer(
        self, request: web.Request, session: AgentSession, asked: ChatRequest
    ) -> web.StreamResponse:
        if asked.ignored and not self._told_ignored:
            self._told_ignored = True
            logger.warning(
                "the agent asks for %s, which is ignored: the policy is trained as it is sampled, "
                "by the workflow's `sampling`",
                asked.ignored,
            )
        record = session.recorder.begin(asked)
        completion = await session.context.generate(list(record.input_ids), asked.sampling)
        message = session.recorder.end(asked, record, completion)
        told = (f"chatcmpl-{secrets.token_hex(8)}", message, completion, len(record.input_ids))
        if not asked.stream:
            return web.json_response(completion_body(*told))
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        for event in completion_events(*told, include_usage=asked.include_usage):
            await response.write(event)
        await response.write_eof()
        return response

    def _find(self, request: web.Request) -> AgentSession:
        session = self._sessions.get(request.match_info["session"])
        if session is None:
            raise web.HTTPNotFound(text="this episode has ended")
        if not bears(request.headers.get("Authorization"), session.api_key):
            raise web.HTTPUnauthorized(text="the key is not this episode's")
        if self._door is not None:
            self._door.heard(request.transport)
        return session


async def _json(request: web.Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def _refused(session: AgentSession, error: Exception, status: HTTPStatus) -> web.Response:
    session.failure = session.failure or error
    body = {"error": {"message": str(error), "type": type(error).__name__, "code": None}}
    # The package would send it twice more.
    return web.json_response(body, status=status, headers={"x-should-retry": "false"})


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    if waiting:
        await asyncio.wait(waiting)
