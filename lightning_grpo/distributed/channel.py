"""The channel between ranks, who wait on messages, never inside a collective.

A gloo collective that timed out can't be retried, and no signal interrupts one. So whatever only
rank 0 does (a rollout batch, a weight sync, an evaluation) ends with `wait` on every rank: rank 0
waits for the work in short polls and publishes under a sequence number how it ended (`Kind`); the
others poll for that. Only then does anybody enter a collective.
"""

from __future__ import annotations

import atexit
import math
import os
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from lightning_grpo.algorithm.metrics import Metrics, from_tensors, to_tensors
from lightning_grpo.distributed.heartbeat import (
    Exchange,
    Failure,
    Heart,
    Kind,
    ProcessLike,
    RankLedger,
    RunningClock,
    Store,
    WaitOutcome,
    Watchdog,
    is_echo,
    open_store,
)
from lightning_grpo.errors import RankError, RolloutsLostError, StopRun


def reduced(metrics: Metrics, device: torch.device, copies: int = 1) -> Callable[[], Metrics]:
    """Begin to reduce metrics over all ranks: two all-reduces; every rank has the same names.

    Args:
        metrics: This rank's.
        device: Where they are reduced.
        copies: Ranks that compute the same tokens, which count once.

    Returns:
        A function that returns them. It waits for the GPU's work up to here, not for what is
        launched later.
    """
    sums, maxima = to_tensors(metrics, device)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
        distributed.all_reduce(maxima, op=distributed.ReduceOp.MAX)
        sums = sums / copies
    arrived = torch.cuda.Event() if device.type == "cuda" else None
    meanwhile = arrived is not None  # what can't be waited for is copied at once
    sums, maxima = (each.to("cpu", non_blocking=meanwhile) for each in (sums, maxima))
    if arrived is not None:
        arrived.record()

    def result() -> Metrics:
        if arrived is not None:
            arrived.synchronize()
        return from_tensors(metrics, sums, maxima)

    return result


_FAREWELL_S = 5.0
"""How long last words wait to be read."""


def what_happened(error: BaseException) -> str:
    """What the other ranks are told; where Ctrl-C found this one is nobody's concern."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = "".join(traceback.format_exception(error))
    return text.encode(errors="backslashreplace").decode()  # half a character can't be sent


ENDING = ("SIGTERM", "SIGINT")
"""Signals that end a run; the others ask for it to be run again as well."""

_AGAIN = 128


def urgency(name: str) -> int:
    """A number to compare by, 0 for no signal.

    A cluster warns (SIGUSR1) and terminates right after, and the kernel may hand the two to
    different threads in either order: the one that keeps the job counts.
    """
    if not name:
        return 0
    return signal.Signals[name].value + (0 if name in ENDING else _AGAIN)


def signal_of(urgency: int) -> str:
    """The name behind a number of `urgency`."""
    return signal.Signals(urgency % _AGAIN).name if urgency else ""


def most_urgent(names: Iterable[str]) -> str:
    """The signal to act on; an empty string if there is none."""
    return signal_of(max(map(urgency, names), default=0))


T = TypeVar("T")


class RankChannel:
    """Waiting, agreeing and handing out shares between the ranks of one run.

    Every method that waits must be called by all ranks, at the same point, from the main thread.
    Made by `single()` or `connect()`.

    Attributes:
        rank: This process.
        world_size: All of them.
        stop_source: Returns the name of the signal that asked this rank to stop, or an empty
            string; called at every poll and every beat, from two threads.
        failed_wait: What `wait` has raised on this rank because rank 0's work failed, and no rank:
            all of them are at the same point then, and can save where they are.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        store: Store | None = None,
        exchange: Exchange | None = None,
        rank_timeout_s: float = 60.0,
        poll_s: float = 0.05,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._farewell_s = min(_FAREWELL_S, rank_timeout_s)
        self.stop_source: Callable[[], str] = str
        self.failed_wait: BaseException | None = None
        self._poll_s = poll_s
        self._exchange = exchange or Exchange()
        self._sequence = 0
        self._store = store  # rank 0's object is the server: it must outlive the run
        self._closed = False
        self._heart: Heart | None = None
        self._watchdog: Watchdog | None = None
        clock = RunningClock(gap_s=max(rank_timeout_s / 2, 4 * poll_s))
        name = f"pid {os.getpid()} on {platform.node()}"
        self._ledger = RankLedger(rank, world_size, name, rank_timeout_s, clock)
        if store is not None:
            self._heart = Heart(self._ledger, store, lambda: self.stop_source())
            self._heart.start()
            atexit.register(self.close)

    @classmethod
    def single(cls, poll_s: float = 0.05) -> RankChannel:
        """The channel of a run of one process: no store, no group, no thread."""
        return cls(poll_s=poll_s)

    @classmethod
    def connect(
        cls,
        rank: int,
        world_size: int,
        *,
        host: str,
        rank_timeout_s: float = 60.0,
        poll_s: float = 0.05,
        group_timeout_s: float = 1800.0,
    ) -> RankChannel:
        """Join the other ranks; a collective over the default process group.

        Args:
            rank: This process in the default group.
            world_size: The size of the default group; 1 gives `single()`.
            host: Where the other ranks reach rank 0 (the cluster environment's main address).
            rank_timeout_s: Silence after which a rank counts as lost.
            poll_s: Longest time between two looks at signals and messages while waiting.
            group_timeout_s: Limit of one collective on the channel's own gloo group.
        """
        if world_size == 1:
            return cls.single(poll_s)
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=group_timeout_s))
        exchange = Exchange(group, world_size)
        store = open_store(rank, world_size, host, exchange, max(rank_timeout_s, 10.0))
        return cls(rank, world_size, store, exchange, rank_timeout_s, poll_s)

    # ---- waiting ---------------------------------------------------------------------------

    def wait(
        self,
        future: futures.Future[T] | None,
        *,
        what: str,
        deadline_s: float | None = None,
        stop_after_s: float = 0.0,
    ) -> T | None:
        """Wait until rank 0's future is done.

        Args:
            future: Rank 0's work; ignored elsewhere. None: nothing to wait for.
            what: What is waited for, in words; the same on every rank.
            deadline_s: Longer than this is an error; None waits for ever.
            stop_after_s: How long the work may go on once a signal came, which then ends the wait:
                a weight sync had better end, but not wait for servers that may never come.

        Returns:
            The result on rank 0, None elsewhere.

        Raises:
            StopRun: A rank was asked to stop; on every rank.
            RankError: Another rank failed or is gone; elsewhere than on rank 0 also when the
                future failed, with its traceback. Rank 0 raises the future's own exception.
        """

        def result() -> T | None:
            self._poll_future(future, what, deadline_s, stop_after_s)
            if future is None:
                return None
            error = future.exception()
            self.failed_wait = None if isinstance(error, RolloutsLostError) else error
            return future.result()

        return self.on_rank_zero(result, what=what, deadline_s=deadline_s or 0.0)

    def on_rank_zero(
        self, function: Callable[[], T], *, what: str, deadline_s: float = 0.0
    ) -> T | None:
        """Run something in rank 0's main thread while the others wait for its end.

        Args:
            function: Called on rank 0 only; must not enter a collective.
            what: What it does, in words; the same on every rank.
            deadline_s: How long rank 0 may be silent, beyond `rank_timeout_s`.

        Returns:
            Its result on rank 0, None elsewhere. Raises as `wait` does.
        """
        self._sequence += 1
        with self._quickened():
            if self.rank != 0:
                self._follow(what)
                return None
            self._ledger.advance(what, deadline_s)
            with self._publishing(what):
                return function()

    def beat(self, what: str | None = None, deadline_s: float = 0.0) -> None:
        """Tell the others that the main thread moves on, and how long it will now be busy."""
        self._ledger.advance(what, deadline_s)

    # ---- exchanging (collectives: enter them after a wait) ----------------------------------

    def broadcast(self, value: T | None) -> T:
        """Rank 0's object on every rank."""
        return self._exchange.broadcast(value)

    def scatter(self, values: Sequence[T] | None) -> T:
        """Entry r of rank 0's list on rank r; the other ranks pass None."""
        return self._exchange.scatter(values)

    def gather(self, value: T) -> list[T] | None:
        """Every rank's object, in their order, on rank 0; None elsewhere."""
        return self._exchange.gather(value)

    def agree_on_stop(self) -> str:
        """The name of a signal that reached any rank, the same on every rank; empty if none."""
        return signal_of(self._exchange.largest(urgency(self.stop_source())))

    def stop_run(self, signal_name: str, message: str) -> StopRun:
        """The error that ends a run on request, with this rank's exit status."""
        number = signal.Signals[signal_name].value
        return StopRun(message, number, exit_code=None if self.rank == 0 else 0)

    # ---- failing and leaving ----------------------------------------------------------------

    def start_watchdog(self, grace_s: float = 5.0) -> None:
        """End this process `grace_s` after another rank is lost, even from inside a collective.

        The exit status is then `heartbeat.EXIT_RANK_LOST` (75), the reason is on standard error.
        """
        if self._heart is not None and self._watchdog is None:
            self._watchdog = Watchdog(self._ledger, grace_s, self._poll_s)
            self._watchdog.start()

    def watch_processes(self, processes: Mapping[int, ProcessLike]) -> None:
        """Rank 0: processes that it started itself, by rank; their end is noticed at once."""
        self._ledger.processes.update(processes)

    def report_failure(self, error: BaseException) -> RankError | None:
        """Tell the others that this rank fails; they end, naming it.

        A collective's own error is mostly the echo of another rank's end: then this waits for the
        culprit to show itself, up to `rank_timeout_s`.

        Returns:
            What is wrong with another rank, if that is why this one fails.
        """
        if isinstance(error, RankError):
            return error  # everybody who can be reached knows
        if self.world_size == 1 or self._closed or isinstance(error, StopRun):
            return None
        if is_echo(error):
            limit_s = self._ledger.rank_timeout_s + 1.0
            self._until(lambda: self._ledger.verdict() is not None, limit_s, self._poll_s)
        cause = self._ledger.verdict()
        self._tell(cause or Failure(self.rank, what_happened(error)))
        return None if cause is None else self._error_for(cause)

    def close(self, linger_s: float = 5.0) -> None:
        """Leave in good order; idempotent.

        The last words are read by the others first. Ranks above 0 leave after rank 0, because
        Lightning's launcher kills rank 0 when a child ends with an error.

        Args:
            linger_s: Longest time for that.
        """
        if self.world_size == 1 or self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        tick = self._ledger.say(closed=True)
        if self.rank == 0:
            self._until(lambda: self._ledger.all_have_seen(tick), linger_s)
        else:
            self._until(self._ledger.rank_zero_left, linger_s)
        for thread in (self._watchdog, self._heart):
            if thread is not None:
                thread.stop()

    # ---- private ----------------------------------------------------------------------------

    def _quickened(self) -> AbstractContextManager[None]:
        """Talk and listen fast for a while."""
        return nullcontext() if self._heart is None else self._heart.quickened()

    @contextmanager
    def _publishing(self, what: str) -> Iterator[None]:
        """Rank 0: say how the block ended."""
        try:
            yield
        except StopRun as stop:
            self._publish(Kind.STOP, what, signal.Signals(stop.signal).name)
            raise
        except BaseException as error:
            kind = Kind.FAILED if error is self.failed_wait else Kind.ERROR
            self._publish(kind, what, what_happened(error))
            raise
        self._publish(Kind.READY, what)

    def _publish(self, kind: Kind, what: str, text: str = "") -> None:
        if self._heart is None:
            return
        tick = self._ledger.publish(WaitOutcome(self._sequence, kind, what, text))
        self._heart.wake()
        if kind is not Kind.READY:  # this process may end soon, and the store with it
            self._until(lambda: self._ledger.all_have_seen(tick), self._farewell_s)

    def _tell(self, failure: Failure) -> None:
        """Put a failure into the record and wait until it is known."""
        ledger = self._ledger
        tick = ledger.fail(failure)

        def known() -> bool:
            if self.rank == 0:
                return ledger.all_have_seen(tick)
            return ledger.rank_zero_left() or ledger.peers[0].pulse.failure is not None

        if self._heart is not None:
            self._until(known, self._farewell_s)

    def _until(self, condition: Callable[[], bool], limit_s: float, poll_s: float = 0.01) -> None:
        """Wait a bounded time for something to be heard."""
        end = time.monotonic() + limit_s
        with self._quickened():
            while not condition() and time.monotonic() < end:
                time.sleep(poll_s)

    def _raise_for(self, failure: Failure | None) -> None:
        if failure is not None:
            raise self._error_for(failure)

    def _error_for(self, failure: Failure) -> RankError:
        """The error that a verdict becomes; the main thread knows now and may leave in order."""
        if self._watchdog is not None:
            self._watchdog.extend(self._ledger.rank_timeout_s)
        return RankError(f"rank {failure.rank} failed: {failure.text}")

    def _poll_future(
        self,
        future: futures.Future[Any] | None,
        what: str,
        deadline_s: float | None,
        stop_after_s: float,
    ) -> None:
        started, stop_at = time.monotonic(), math.inf
        while future is not None and not future.done():
            futures.wait([future], timeout=self._poll_s)
            self._ledger.advance(None, deadline_s or 0.0)
            name = self._any_stop()
            if name:
                stop_at = min(stop_at, time.monotonic() + stop_after_s)
                if time.monotonic() >= stop_at:
                    raise self._stop(name, what)
            self._raise_for(self._ledger.verdict())
            if deadline_s is not None and time.monotonic() - started > deadline_s:
                msg = f"{what} took longer than {deadline_s:g} s."
                raise RankError(msg)

    def _any_stop(self) -> str:
        heard = [p.pulse.stop for p in self._ledger.peers.values()]
        return most_urgent([self.stop_source(), *heard])

    def _follow(self, what: str) -> None:
        since = self._ledger.clock.now()
        while True:
            outcome = self._ledger.outcome(self._sequence)
            if outcome is not None and outcome.what != what:
                self._out_of_step(outcome.what, what)
            if outcome is not None and outcome.kind is Kind.READY:
                return
            self._raise_for(self._ledger.heard())
            if outcome is not None and outcome.kind is Kind.STOP:
                raise self._stop(outcome.text, what)
            if outcome is not None:
                text = f"while the ranks waited for {what}:\n{outcome.text}"
                error = self._error_for(Failure(0, text))
                self.failed_wait = error if outcome.kind is Kind.FAILED else None
                raise error
            self._raise_for(self._ledger.verdict() or self._ledger.stalled(since))
            self._ledger.advance(what, 0.0)
            with self._ledger.changed:
                self._ledger.changed.wait(self._poll_s)

    def _out_of_step(self, theirs: str, ours: str) -> None:
        msg = f"ranks are out of step: rank 0 waited for {theirs!r}, rank {self.rank} for {ours!r}."
        self._tell(Failure(self.rank, msg))
        raise RankError(msg)

    def _stop(self, name: str, what: str) -> StopRun:
        return self.stop_run(name, f"{name} while waiting for {what}")
