"""Work on the servers' weights: one piece at a time, and none after the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from lightning_grpo.errors import WeightSyncError


class Turns:
    """A lock that can be closed: whoever has it then gets a moment, whoever waits is refused."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._scope: anyio.CancelScope | None = None
        self._closed = False

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Waits for the others.

        Raises:
            WeightSyncError: It was closed, before or meanwhile.
        """
        async with self._lock:
            with anyio.CancelScope() as self._scope:
                if not self._closed:
                    yield
                    return
            raise WeightSyncError("the weight publisher was closed")

    async def close(self, wait_s: float) -> None:
        """Waits until nothing is under way; breaks it off after `wait_s`."""
        self._closed = True
        with anyio.move_on_after(wait_s):
            async with self._lock:
                return
        if self._scope is not None:
            self._scope.cancel()
        async with self._lock:
            pass
