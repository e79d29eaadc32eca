"""Background tasks whose failure reaches whoever waits, and fair turns on an event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.abc

from lightning_grpo.errors import RolloutError

_T = TypeVar("_T")


class ClosedError(RolloutError):
    """The object was left, in order or because of an error beside it."""


class Background:
    """A task group that fails in `check` and `wait`, not in the task that entered it.

    Those who wait are no children of the group: they come from other threads, one call each. So
    the first error is kept, every task is cancelled (each has a scope of its own: the group's would
    cancel the task that entered it too), and every waiter raises that error at once.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._changed = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._scopes: set[anyio.CancelScope] = set()
        self._num_guests = 0

    @property
    def is_running(self) -> bool:
        """Whether tasks can be spawned."""
        return self._tasks is not None

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        self.fail(ClosedError("the rollouts were closed."))
        tasks, self._tasks = self._tasks, None
        if tasks is None:
            return None
        try:
            if isinstance(error, Exception):
                # No task raises, so the group adds nothing: the error leaves without a wrapper.
                await tasks.__aexit__(None, None, None)
                return None
            return await tasks.__aexit__(kind, error, trace)
        finally:
            with anyio.CancelScope(shield=True):
                while self._num_guests:
                    await self._changed.wait()

    def spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a coroutine function in the background."""
        if self._tasks is None:
            raise RolloutError("the rollouts are not running.")
        self._tasks.start_soon(self._guard, function, *arguments)

    async def run(self, function: Callable[..., Awaitable[_T]], *arguments: Any) -> _T:
        """Run a coroutine function for a caller who is no child of the group, and end with it.

        The group is not left before the function has unwound.
        """
        self.check()
        results: list[_T] = []
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            self._num_guests += 1
            try:
                results.append(await function(*arguments))
            finally:
                self._num_guests -= 1
                self._scopes.discard(scope)
                self.notify()
        if not results:
            self.check()
        return results[0]

    def check(self) -> None:
        """Raise what ended the background, if it has ended."""
        if self.failure is not None:
            raise self.failure

    def notify(self) -> None:
        """Something changed that somebody may wait for."""
        self._changed.set()
        self._changed = anyio.Event()

    @property
    def next_change(self) -> anyio.Event:
        """Set at the next `notify`; to be read before what is waited for is looked at."""
        return self._changed

    def fail(self, error: BaseException) -> None:
        """End every task; the first error given stays."""
        self.failure = self.failure or error
        for scope in self._scopes:
            scope.cancel()
        self.notify()

    async def _guard(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        if self.failure is not None:
            return
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await function(*arguments)
            except Exception as error:  # noqa: BLE001 - kept for everybody who waits
                self.fail(error)
            finally:
                self._scopes.discard(scope)


class Turns:
    """Lets those who come at once go on a few in each turn of the event loop, in order.

    What a thousand of them do next would hold the loop until all of it is done. How many go follows
    from how long their turns take.

    Args:
        turn_s: How long a turn may be.
    """

    def __init__(self, turn_s: float = 0.02) -> None:
        self._turn_s = turn_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._most, self._gone, self._began = 8, 0, 0.0

    async def take(self) -> None:
        """Wait for one's turn; at once where few come."""
        if self._gone < self._most and not self._waiting:
            self._go()
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def _go(self) -> None:
        if not self._gone:
            self._began = time.monotonic()
            asyncio.get_running_loop().call_soon(self._next)
        self._gone += 1

    def _next(self) -> None:
        if self._waiting:
            slow = time.monotonic() - self._began > self._turn_s
            self._most = max(1, self._most // 2) if slow else min(16, self._most + 1)
        self._gone = 0
        while self._waiting and self._gone < self._most:
            future = self._waiting.popleft()
            if not future.done():
                self._go()
                future.set_result(None)


def in_turns(functions: Sequence[Callable[[], object]], at_once: int = 16) -> None:
    """Call quick functions one after another, few in each turn of the event loop.

    What a thousand of them set off at once would hold the loop until all of it is done.
    """
    for function in functions[:at_once]:
        function()
    if len(functions) > at_once:
        asyncio.get_running_loop().call_soon(in_turns, functions[at_once:], at_once)


def seen(future: asyncio.Future[Any]) -> None:
    """For `add_done_callback` where whoever waits may leave, or asyncio complains of the error."""
    if not future.cancelled():
        future.exception()
