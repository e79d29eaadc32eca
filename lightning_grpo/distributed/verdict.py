"""Who is at fault: reads the ledger and names the rank that failed or fell silent."""

from __future__ import annotations

import re
import signal
import time
from typing import Protocol

import torch.distributed as dist

from lightning_grpo.distributed.pulse import Failure, Ledger

_ECHO = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|tcpstore", re.I)


class ProcessLike(Protocol):
    """A child process, as `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """The exit status, None while it runs; negative for a signal."""


def is_echo(error: BaseException) -> bool:
    """Whether this looks like a collective that broke because another rank ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _ECHO.search(str(error)) is not None


class Judge:
    """Decides whether another rank is lost.

    Args:
        ledger: What was heard of the others.
        rank_timeout_s: Silence after which a rank counts as lost.
    """

    def __init__(self, ledger: Ledger, rank_timeout_s: float) -> None:
        self.processes: dict[int, ProcessLike] = {}
        self._ledger = ledger
        self._rank_timeout_s = rank_timeout_s

    def heard(self) -> Failure | None:
        """A failure that some rank reported, this rank's own report left out."""
        failure = self._ledger.failure
        if failure is None or failure.rank != self._ledger.rank:
            return failure
        if self._ledger.mine.failure is not None:
            return None
        return Failure(failure.rank, f"the others gave up on this rank: {failure.text}")

    def verdict(self) -> Failure | None:
        """What is wrong with another rank, or None; rank 0 passes it on to all."""
        found = self.heard() or self._ended_child() or self._lost_store() or self._silent()
        if found is not None and self._ledger.rank == 0:
            self._ledger.fail(found)
        return found

    def verdict_within(self, limit_s: float, poll_s: float) -> Failure | None:
        """The verdict, waited for."""
        end = time.monotonic() + limit_s
        while (found := self.verdict()) is None and time.monotonic() < end:
            time.sleep(poll_s)
        return found

    def stalled(self, since: float) -> Failure | None:
        """Whether rank 0's main thread stands still, seen by a rank that waits since then."""
        peer = self._ledger.peers[0]
        if peer.pulse.closed:
            return Failure(0, "left the run while this rank still waited for it")
        age_s = self._ledger.clock.now() - max(peer.progress_at, since)
        limit_s = peer.pulse.allowance_s + self._rank_timeout_s
        if age_s <= limit_s:
            return None
        return Failure(
            0,
            f"its process runs ({peer.pulse.name}), but its main thread made no progress for "
            f"{age_s:.0f} s (allowed: {limit_s:g} s); last known in: {peer.pulse.what}",
        )

    def _ended_child(self) -> Failure | None:
        for rank, process in self.processes.items():
            code = process.poll()
            if code is not None and code != 0:
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                return Failure(rank, f"its process ended: {how}")
        return None

    def _lost_store(self) -> Failure | None:
        if not self._ledger.lost or self._ledger.peers[0].pulse.closed:
            return None
        name = self._ledger.peers[0].pulse.name
        return Failure(0, f"its process is gone ({name}): {self._ledger.lost}")

    def _silent(self) -> Failure | None:
        now = self._ledger.clock.now()
        for rank, peer in self._ledger.peers.items():
            age_s = now - peer.changed_at
            if age_s > self._rank_timeout_s and not peer.pulse.closed:
                return Failure(
                    rank,
                    f"silent for {age_s:.1f} s ({peer.pulse.name or 'never heard of'}): killed, "
                    f"stopped or cut off; last known in: {peer.pulse.what}",
                )
        return None
