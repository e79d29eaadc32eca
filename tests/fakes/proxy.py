"""Proxies that stand before a real server, and what they do to its answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from anyio.from_thread import start_blocking_portal

from tests.fakes.listening import listen, stop_accepting


class ForwardingProxy:
    """Hands every request on to the server at `target`; subclasses interfere in `answer`."""

    def __init__(self) -> None:
        self._port = 0
        self._session: aiohttp.ClientSession | None = None

    @property
    def target(self) -> str:
        """The server's own URL."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def answer(self, request: web.Request, body: bytes) -> web.Response | None:
        """An answer in the place of the server's; None hands the request on."""
        return None

    def changed(self, path: str, content: bytes) -> bytes:
        """The server's answer as it is passed back."""
        return content

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Any]:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._forward)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        listener = listen()
        await web.SockSite(runner, listener).start()
        self._port = listener.getsockname()[1]
        try:
            async with aiohttp.ClientSession() as self._session:
                yield self
        finally:
            await stop_accepting(listener)
            await runner.cleanup()

    async def _forward(self, request: web.Request) -> web.Response:
        assert self._session is not None
        body = await request.read()
        answer = await self.answer(request, body)
        if answer is not None:
            return answer
        try:
            async with self._session.request(
                request.method,
                self.target + request.path_qs,
                data=body,
                headers={"Content-Type": "application/json"},
            ) as reply:
                content = self.changed(request.path, await reply.read())
                return web.Response(body=content, status=reply.status)
        except aiohttp.ClientError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()


@dataclass
class FaultyProxy(ForwardingProxy):
    """Fails every n-th request, knows no `missing` path, and says of the server what isn't true.

    Attributes:
        server_url: What it stands before.
        error_every: Every so many requests one is answered 500 (0: none), in the server's place.
        missing: Paths that are answered 404.
        claims: By path, what is laid over the server's JSON answer.
        num_requests: How many came.
        errors: The paths that were answered 500.
    """

    server_url: str
    error_every: int = 0
    missing: tuple[str, ...] = ()
    claims: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_requests: int = 0
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def target(self) -> str:
        return self.server_url

    async def answer(self, request: web.Request, body: bytes) -> web.Response | None:
        self.num_requests += 1
        if request.path in self.missing:
            return web.json_response({"detail": "Not Found"}, status=404)
        if self.error_every and self.num_requests % self.error_every == 0:
            self.errors.append(request.path)
            return web.Response(status=500, text="Internal Server Error")
        return None

    def changed(self, path: str, content: bytes) -> bytes:
        if path not in self.claims:
            return content
        return json.dumps(json.loads(content) | dict(self.claims[path])).encode()


@contextmanager
def in_a_thread(proxy: ForwardingProxy) -> Iterator[Any]:
    """The proxy on an event loop of its own, beside what blocks."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(proxy.listening()):
        yield proxy
