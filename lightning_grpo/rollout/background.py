"""Tasks in the background of an object, whose failure reaches whoever waits on the object."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc

from lightning_grpo.errors import RolloutError


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
        if isinstance(error, Exception):
            # No task raises, so the group has nothing to add: the error leaves without a wrapper.
            await tasks.__aexit__(None, None, None)
            return None
        return await tasks.__aexit__(kind, error, trace)

    def spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a coroutine function in the background."""
        if self._tasks is None:
            raise RolloutError("the rollouts are not running.")
        self._tasks.start_soon(self._guard, function, *arguments)

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


def seen(future: asyncio.Future[Any]) -> None:
    """For `add_done_callback` where whoever waits may leave, or asyncio complains of the error."""
    if not future.cancelled():
        future.exception()
