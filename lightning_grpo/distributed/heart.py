"""The one thread that touches the store, and the one that ends a rank that can't end itself."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator

from lightning_grpo.distributed.pulse import Failure, Ledger, Pulse
from lightning_grpo.distributed.store import Store

log = logging.getLogger(__name__)

EXIT_RANK_LOST = 75
"""Exit status of a rank that was ended because another one failed (sysexits' EX_TEMPFAIL)."""

_RESTING_S = 0.5
_WAITING_S = 0.01


class Heart:
    """Writes this rank's record and reads the others', for as long as the run lasts.

    A store call blocks for good while rank 0's process is stopped, so no other thread makes one;
    the others look at the age of what was read. Torch releases the GIL during the call.

    Args:
        ledger: Where records are kept.
        store: Reached by every rank; lives in rank 0's process.
        rank_timeout_s: The limit of silence; the resting beat is a tenth of it at most.
        stop_source: The name of the signal that this rank got, or an empty string.
    """

    def __init__(
        self, ledger: Ledger, store: Store, rank_timeout_s: float, stop_source: Callable[[], str]
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._stop_source = stop_source
        self._resting_s = min(_RESTING_S, rank_timeout_s / 10)
        self._waiting_s = max(_WAITING_S, ledger.world_size * 0.0005)
        self._wake = threading.Event()
        self._end = threading.Event()
        self._busy = 0
        self._told: set[int] = set()  # ranks whose record somebody else wrote
        self._thread = threading.Thread(target=self._run, name="grpo-heart", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def wake(self) -> None:
        """Beat now: something new is to be said."""
        self._wake.set()

    @contextlib.contextmanager
    def quickened(self) -> Iterator[None]:
        """Beat fast while the main thread waits for an answer."""
        self._busy += 1
        self.wake()
        try:
            yield
        finally:
            self._busy -= 1

    def stop(self) -> None:
        """Beat no more; a thread that hangs in a store call is left behind (it is a daemon)."""
        self._end.set()
        self._wake.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        ledger = self._ledger
        keys = {rank: f"pulse/{rank}" for rank in ledger.peers}
        while not self._end.is_set():
            try:
                beat = ledger.next_beat(self._stop_source())
                self._store.set(f"pulse/{ledger.rank}", beat.encode())
                values = self._store.multi_get(list(keys.values()))
            except RuntimeError as error:  # torch's DistError: the process with the store is gone
                ledger.lose(str(error).splitlines()[0])
                return
            read = {rank: self._read(rank, v) for rank, v in zip(keys, values, strict=True)}
            ledger.hear({rank: pulse for rank, pulse in read.items() if pulse is not None})
            self._wake.wait(self._waiting_s if self._busy else self._resting_s)
            self._wake.clear()

    def _read(self, rank: int, data: bytes) -> Pulse | None:
        """A rank's record; None where there is none, or somebody else has written over it."""
        try:
            return Pulse.decode(data)
        except (ValueError, TypeError, KeyError, AttributeError):
            # Its own next beat comes soon; one that stays away is silent, and found so.
            if self._ledger.peers[rank].pulse.tick and rank not in self._told:
                self._told.add(rank)
                log.warning(
                    "the record of rank %d in the ranks' store was not written by it, and is "
                    "skipped: another program reaches this run's port.",
                    rank,
                )
            return None


class Watchdog:
    """Ends this process when another rank is gone and the main thread can't notice.

    The main thread may sit in a collective that no signal interrupts. It gets `grace_s` to end
    the program in its own way, then the process exits with `EXIT_RANK_LOST`.

    Args:
        rank: For messages.
        verdict: Names what is wrong with another rank, or None.
        grace_s: Time for the main thread once the verdict is there.
        poll_s: How often to look.
    """

    def __init__(
        self, rank: int, verdict: Callable[[], Failure | None], grace_s: float, poll_s: float
    ) -> None:
        self._rank = rank
        self._verdict = verdict
        self._grace_s = grace_s
        self._poll_s = poll_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="grpo-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def extend(self, grace_s: float) -> None:
        """The main thread knows: give it longer to leave in good order."""
        self._grace_s = max(self._grace_s, grace_s)

    def stop(self) -> None:
        """Look no more."""
        self._end.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while (failure := self._verdict()) is None:
            if self._end.wait(self._poll_s):
                return
        self._say(f"rank {failure.rank} failed; this rank ends.\n{failure.text}")
        waited_s = 0.0
        while waited_s < self._grace_s:
            if self._end.wait(self._poll_s):
                return
            waited_s += self._poll_s
        self._say(f"did not end by itself within {self._grace_s:g} s; it was here:")
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_RANK_LOST)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"[rank {self._rank}] {text}\n")
        sys.stderr.flush()
