"""The event loop in its thread, background tasks whose failure reaches who waits, fair turns."""

from __future__ import annotations

import asyncio
import logging
import random
import selectors
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.abc
from anyio.from_thread import BlockingPortal, start_blocking_portal

from lightning_grpo.errors import RolloutError

logger = logging.getLogger(__name__)

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


# -- turns -----------------------------------------------------------------------------------------


class FairTurns:
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


class SameTurn:
    """Gathers what is asked in the same turn of the event loop, and asks it at once.

    Args:
        answer: Gives the answers to several questions of one kind, in their order; None: there are
            none.
    """

    def __init__(self, answer: Callable[[Any, list[Any]], Awaitable[Sequence[Any] | None]]) -> None:
        self._answer = answer
        self._gathering: dict[Hashable, list[tuple[Any, asyncio.Future[Any]]]] = {}
        self._tasks = set[asyncio.Task[None]]()

    async def ask(self, kind: Hashable, question: object) -> Any:
        """The answer to one question; None: there is none."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if kind not in self._gathering:
            self._gathering[kind] = []
            task = asyncio.create_task(self._ask_all(kind))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._gathering[kind].append((question, future))
        return await future

    async def _ask_all(self, kind: Hashable) -> None:
        await asyncio.sleep(0)  # whoever was ready before this task has asked by now
        asked = self._gathering.pop(kind)
        answers: Sequence[Any] = [None] * len(asked)
        try:
            answers = await self._answer(kind, [question for question, _ in asked]) or answers
        finally:
            for (_, future), answer in zip(asked, answers, strict=True):
                if not future.done():
                    future.set_result(answer)


def seen(future: asyncio.Future[Any]) -> None:
    """For `add_done_callback` where whoever waits may leave, or asyncio complains of the error."""
    if not future.cancelled():
        future.exception()


# -- the loop in its thread ------------------------------------------------------------------------

_BEAT_S = 0.1
SWITCH_INTERVAL_S = 0.0001
"""How long one thread may keep the interpreter while another waits for it.

The trainer gives it up at every kernel it starts, and with Python's own 5 ms waits that long to get
it back while the loop is busy (`benchmarks/beside.py`).
"""
MOST_READY = 128
"""To read from so many sockets takes milliseconds."""

_LOOP_LOST = "the rollouts' event loop was ended from outside, or by a SystemExit in it."
Build = Callable[[], AbstractAsyncContextManager[object]]


class SteadySelector(selectors.DefaultSelector):
    """Reports some of the sockets that are ready, so that a turn of the event loop is short.

    When the replies to thousands of requests come at once, asyncio would read all of them before
    anything else runs.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Some of what is ready; the rest is reported again."""
        ready = super().select(timeout)
        if len(ready) <= MOST_READY:
            return ready
        # Wherever it begins, or the last would wait for ever.
        begin = random.randrange(len(ready))
        return [*ready, *ready][begin : begin + MOST_READY]


def steady_loop() -> asyncio.AbstractEventLoop:
    """An event loop that is never held for long by what comes at once."""
    return asyncio.SelectorEventLoop(SteadySelector())


class EventLoop:
    """Holds a context open on an event loop in a thread of its own, and takes calls to it.

    Every call that waits is a future, and every future raises at once when the loop's main task
    ends, whatever ended it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._thread: AbstractContextManager[BlockingPortal] | None = None
        self._main_task: Future[None] | None = None
        self._live = False
        self._failure: BaseException | None = None
        self._stop: anyio.Event | None = None
        self._ended: anyio.Event | None = None
        self._worst_lag_s = 0.0
        self._last_beat: float | None = None
        self._switch_interval_s: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether calls are taken: between `start` and `close`, unless what runs there failed."""
        return self._portal is not None and self._live

    def start(self, build: Build) -> None:
        """Start the loop and enter `build()` on it; raises what entering raises.

        Args:
            build: Makes the context that holds what runs on the loop; it is left there as well.
        """
        if self._portal is not None:
            raise RolloutError("the rollouts are already running.")
        self._failure = None
        if (before := sys.getswitchinterval()) > SWITCH_INTERVAL_S:
            self._switch_interval_s = before
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        options = {"loop_factory": steady_loop}
        self._thread = start_blocking_portal("asyncio", backend_options=options)
        self._portal = self._thread.__enter__()
        try:
            self._main_task, _ = self._portal.start_task(self._main, build)
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[..., Awaitable[_T]], *arguments: Any) -> Future[_T]:
        """Run a coroutine function on the loop."""
        running = self._submit(self._until_ended, function, *arguments)
        outcome: Future[_T] = Future()
        running.add_done_callback(lambda done: self._pass_on(done, outcome))
        return outcome

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a quick function on the loop and wait: nothing else runs there meanwhile."""
        if self._portal is not None and not self._live:
            raise self._why_ended()
        return self._submit(function, *arguments).result()

    def lag_s(self) -> float:
        """The longest that the loop was late since the last call (`health/event_loop_lag_s`).

        Counted from when the producer runs.
        """
        worst, self._worst_lag_s = self._worst_lag_s, 0.0
        last = self._last_beat
        return worst if last is None else max(worst, time.monotonic() - last - _BEAT_S)

    def close(self) -> None:
        """End everything; may be called at any time, also twice and after a failure."""
        with self._lock:
            portal, self._portal = self._portal, None
            thread, self._thread = self._thread, None
        if portal is None or thread is None:
            return
        try:
            if self._stop is not None and self._main_task is not None:
                portal.call(self._stop.set)
                error = self._main_task.exception()
                if error is not None:
                    logger.debug("the rollouts had ended with %r", error)
        except (RuntimeError, CancelledError) as error:
            logger.debug("the event loop had ended: %s", error)
        finally:
            thread.__exit__(None, None, None)
            if self._switch_interval_s is not None:
                sys.setswitchinterval(self._switch_interval_s)
                self._switch_interval_s = None

    # ---- on the loop -----------------------------------------------------------------------

    async def _main(
        self, build: Build, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        self._stop, self._ended = anyio.Event(), anyio.Event()
        self._last_beat, self._worst_lag_s = None, 0.0
        # What is started from this thread, servers and rewards, inherits the mask: Slurm sends its
        # warning before the time limit to every process of the job, and it would end them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            async with build(), anyio.create_task_group() as tasks:
                self._live = True
                tasks.start_soon(self._beat)
                task_status.started()
                await self._stop.wait()
                tasks.cancel_scope.cancel()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._live = False
            self._ended.set()

    async def _beat(self) -> None:
        while True:
            self._last_beat = before = time.monotonic()
            await anyio.sleep(_BEAT_S)
            self._worst_lag_s = max(self._worst_lag_s, time.monotonic() - before - _BEAT_S)

    async def _until_ended(self, function: Callable[..., Awaitable[_T]], *arguments: Any) -> _T:
        results: list[_T] = []
        errors: list[BaseException] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._cancel_at_the_end, tasks.cancel_scope)
            try:
                results.append(await function(*arguments))
            except Exception as error:  # noqa: BLE001 - raised below, without the group's wrapper
                errors.append(_alone(error))
            tasks.cancel_scope.cancel()
        if results:
            return results[0]
        if errors and not isinstance(errors[0], ClosedError):
            raise errors[0]
        # What closed it may still be on its way up through the context of `build()`.
        if self._ended is not None:
            await self._ended.wait()
        raise self._why_ended()

    async def _cancel_at_the_end(self, scope: anyio.CancelScope) -> None:
        if self._ended is not None:
            await self._ended.wait()
        scope.cancel()

    def _pass_on(self, done: Future[_T], outcome: Future[_T]) -> None:
        if done.cancelled():  # with the loop itself
            outcome.set_exception(RolloutError(_LOOP_LOST))
        elif (error := done.exception()) is not None:
            # What ends a thread from outside may hit any of its tasks, also a group of them.
            killed = isinstance(error, BaseExceptionGroup) and not isinstance(error, Exception)
            outcome.set_exception(RolloutError(_LOOP_LOST) if killed else error)
        else:
            outcome.set_result(done.result())

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._portal is None:
            raise self._why_ended()
        try:
            return self._portal.start_task_soon(function, *arguments)
        except RuntimeError as error:  # of a portal whose loop is ending, or has ended
            raise RolloutError(_LOOP_LOST) from error

    def _why_ended(self) -> BaseException:
        failure = self._failure and _alone(self._failure)
        if isinstance(failure, asyncio.CancelledError | SystemExit):
            return RolloutError(_LOOP_LOST)
        return failure or RolloutError("the rollouts are not running.")


def _alone(error: BaseException) -> BaseException:
    """The one error that a task group wrapped; of several, the group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
