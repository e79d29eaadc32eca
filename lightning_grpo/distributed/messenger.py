"""Saying something to the other ranks, and making sure that it was heard before leaving."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from lightning_grpo.distributed.heart import Heart, Watchdog
from lightning_grpo.distributed.pulse import Failure, Kind, Ledger, Outcome
from lightning_grpo.errors import RankError, StopRun

_FAREWELL_S = 5.0


class Messenger:
    """This rank's outgoing side; silent in a run of one process.

    Args:
        ledger: Where this rank's record is kept.
        heart: Writes it; None in a run of one process.
        rank_timeout_s: The limit of silence; last words wait no longer than that.
    """

    def __init__(self, ledger: Ledger, heart: Heart | None, rank_timeout_s: float) -> None:
        self._ledger = ledger
        self._heart = heart
        self._watchdog: Watchdog | None = None
        self._rank_timeout_s = rank_timeout_s
        self._farewell_s = min(_FAREWELL_S, rank_timeout_s)

    def start_watchdog(
        self, verdict: Callable[[], Failure | None], grace_s: float, poll_s: float
    ) -> None:
        """Watch the others from a thread; once."""
        if self._heart is not None and self._watchdog is None:
            self._watchdog = Watchdog(self._ledger.rank, verdict, grace_s, poll_s)
            self._watchdog.start()

    def quickened(self) -> AbstractContextManager[None]:
        """Talk and listen fast for a while."""
        return nullcontext() if self._heart is None else self._heart.quickened()

    @contextmanager
    def publishing(self, sequence: int, what: str) -> Iterator[None]:
        """Rank 0: say how the block ended."""
        try:
            yield
        except StopRun as stop:
            self._publish(Outcome(sequence, Kind.STOP, what, signal.Signals(stop.signal).name))
            raise
        except BaseException as error:
            self._publish(Outcome(sequence, Kind.ERROR, what, what_happened(error)))
            raise
        self._publish(Outcome(sequence, Kind.READY, what))

    def tell(self, failure: Failure) -> None:
        """Put a failure into the record and wait until it is known."""
        tick = self._ledger.fail(failure)
        if self._heart is None:
            return
        self._heart.wake()
        if self._ledger.rank == 0:
            self.until(lambda: self._ledger.all_have_seen(tick), self._farewell_s)
        else:  # rank 0 repeats it
            self.until(self._ledger.rank_zero_knows_failure, self._farewell_s)

    def raise_for(self, failure: Failure | None) -> None:
        """Raise a verdict, if there is one."""
        if failure is not None:
            raise self.error_for(failure)

    def error_for(self, failure: Failure) -> RankError:
        """The error that a verdict becomes; the main thread knows now and may leave in order."""
        if self._watchdog is not None:
            self._watchdog.extend(self._rank_timeout_s)
        return RankError(f"rank {failure.rank} failed: {failure.text}")

    def until(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Wait a bounded time for something to be heard."""
        end = time.monotonic() + limit_s
        with self.quickened():
            while not condition() and time.monotonic() < end:
                time.sleep(0.01)

    def stop(self) -> None:
        """End the threads."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._heart is not None:
            self._heart.stop()

    def _publish(self, outcome: Outcome) -> None:
        if self._heart is None:
            return
        tick = self._ledger.publish(outcome)
        self._heart.wake()
        if outcome.kind is not Kind.READY:  # this process may end soon, and the store with it
            self.until(lambda: self._ledger.all_have_seen(tick), self._farewell_s)


def what_happened(error: BaseException) -> str:
    """What the other ranks are told; where Ctrl-C found this one is nobody's concern."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "".join(traceback.format_exception(error))
