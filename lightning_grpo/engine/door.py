"""Who may come in to an HTTP server of ours: how many at once, and for how long unheard."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

from typing_extensions import override

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

    One that asks for nothing is closed after a while, and at once where it takes the room of a
    newcomer; where all are busy the newcomer is closed. That happens is said once a minute.

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
        self._silent: dict[asyncio.BaseTransport | None, asyncio.TimerHandle] = {}
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
        if transport in self._silent:
            self._silent.pop(transport).cancel()

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
