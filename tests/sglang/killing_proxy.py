"""Stands before a server and kills (or stops) it when a given path is asked for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from aiohttp import web

from lightning_grpo.serving.server import ServerHandle
from tests.fakes.proxy import ForwardingProxy


class KillingProxy(ForwardingProxy):
    """A handle of the pool, behind which a server may die and be started again.

    Attributes:
        server: The server itself.
        signal: What it is sent.
        kill_at: A path; the next request for it kills the server.
        num_kills: How often it did.
        on_generate: Told of every completion that is asked for (not of probes).
    """

    def __init__(self, server: ServerHandle, signum: signal.Signals = signal.SIGKILL) -> None:
        super().__init__()
        self.server = server
        self.signal = signum
        self.kill_at: str | None = None
        self.num_kills = 0
        self.on_generate: Callable[[], None] = lambda: None

    @property
    def target(self) -> str:
        return self.server.url

    @property
    def pid(self) -> int | None:
        return self.server.pid

    def log_tail(self) -> str:
        return self.server.log_tail()

    async def answer(self, request: web.Request, body: bytes) -> web.Response | None:
        asked = request.path == self.kill_at and request.method != "OPTIONS"
        if asked and self.server.pid is not None:
            self.kill_at = None
            self.num_kills += 1
            os.kill(self.server.pid, self.signal)
            await asyncio.sleep(0.05)
        if request.path == "/generate" and b'"rid"' in body:
            self.on_generate()
        return None
