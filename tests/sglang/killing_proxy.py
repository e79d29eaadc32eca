"""Stands before a server and kills it when a given path is asked for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from lightning_grpo.servers.base import ServerHandle


class KillingProxy:
    """A handle of the pool, behind which a server may die and be started again.

    Attributes:
        server: The server itself.
        kill_at: A path; the next request for it kills the server.
        num_kills: How often it did.
        on_generate: Told of every completion that is asked for (not of probes).
    """

    def __init__(self, server: ServerHandle) -> None:
        self.server = server
        self.kill_at: str | None = None
        self.num_kills = 0
        self.on_generate: Callable[[], None] = lambda: None
        self._port = 0
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        return self.server.pid

    def log_tail(self) -> str:
        return self.server.log_tail()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[KillingProxy]:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._forward)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as self._session:
            yield self
            await runner.cleanup()

    async def _forward(self, request: web.Request) -> web.Response:
        assert self._session is not None
        body = await request.read()
        if request.path == self.kill_at and self.server.pid is not None:
            self.kill_at = None
            self.num_kills += 1
            os.kill(self.server.pid, signal.SIGKILL)
            await asyncio.sleep(0.05)
        if request.path == "/generate" and b'"rid"' in body:
            self.on_generate()
        try:
            async with self._session.request(
                request.method,
                self.server.url + request.path_qs,
                data=body,
                headers={"Content-Type": "application/json"},
            ) as reply:
                return web.Response(body=await reply.read(), status=reply.status)
        except aiohttp.ClientError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
