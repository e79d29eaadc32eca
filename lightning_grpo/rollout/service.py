"""The one event loop, in one thread: the trainer's few calls into it, and its end."""

from __future__ import annotations

import asyncio
import logging
import random
import selectors
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, TypeVar

import anyio
import anyio.abc
from anyio.from_thread import BlockingPortal, start_blocking_portal

from lightning_grpo.errors import RolloutError
from lightning_grpo.serving.background import ClosedError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_BEAT_S = 0.1
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
            outcome.set_exception(error)
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
