"""An event loop whose clock jumps to the next timer: sleeps cost nothing and order is exact."""

from __future__ import annotations

import asyncio
import selectors

import anyio


class _InstantSelector(selectors.DefaultSelector):
    """Doesn't wait: moves the loop's clock by the time that it was asked to wait."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("deadlock: every task waits and no timer is set")
        if not ready and timeout > 0:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For tests without real I/O and threads. Nobody left to run is an error, not a hang."""

    def __init__(self):
        self._instant = _InstantSelector()
        super().__init__(self._instant)

    def time(self):
        return self._instant.now


def run_virtual(function, *args):
    """Run an async function to its end on virtual time."""
    options = {"loop_factory": VirtualTimeLoop}
    return anyio.run(function, *args, backend="asyncio", backend_options=options)
