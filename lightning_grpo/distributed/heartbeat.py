"""Heartbeats: which rank is alive, where it waits, and which one's fault it is.

What a rank says about itself, and what it has heard from the others.

Everything that ranks tell each other outside of collectives is one small record per rank, written
again and again under one key of a store. Nobody ever waits for a key: a reader looks at the last
record and at how long ago it changed, by its own clock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import hmac
import logging
import os
import platform
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
from msgspec.structs import replace
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_grpo._compat import listen_at


class Exchange:
    """Broadcast, scatter, gather and agreement between ranks; a process alone has no group.

    Args:
        group: A group of CPU tensors beside the default one.
        world_size: Its size.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, world_size: int = 1) -> None:
        self._group = group
        self._world_size = world_size

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, pickled, on every rank."""
        box = [value]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Entry r of rank 0's list, pickled, on rank r."""
        if values is not None and len(values) != self._world_size:
            msg = f"scatter needs one value per rank ({self._world_size}), got {len(values)}."
            raise ValueError(msg)
        box = list(values or [None])
        if self._group is not None:
            box, entries = [None], None if values is None else box
            dist.scatter_object_list(box, entries, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, pickled, on rank 0; None elsewhere."""
        if self._group is None:
            return [value]
        box = [None] * self._world_size if dist.get_rank(self._group) == 0 else None
        dist.gather_object(value, box, dst=0, group=self._group)
        return box

    def largest(self, value: int) -> int:
        """The largest of all ranks' numbers."""
        box = torch.tensor([value], dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group)
        return int(box.item())


LOOPBACK = "127.0.0.1"


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Read values that exist."""


class SignedStore:
    """A store whose values carry a code that only those who know the run's secret can make.

    torch's store lets anybody write who reaches its port, and read: the secret itself is in no
    value.

    Args:
        store: What holds the values.
        secret: The run's, which its ranks were told over their process group.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store, self._secret = store, secret

    def set(self, key: str, value: str) -> None:
        """Write a value with its code."""
        self._store.set(key, f"{self._code(key, value.encode())} {value}")

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read values; empty where somebody else has written one."""
        found = self._store.multi_get(keys)
        return [self._opened(key, data) for key, data in zip(keys, found, strict=True)]

    def _opened(self, key: str, data: bytes) -> bytes:
        code, _, value = data.partition(b" ")
        return value if hmac.compare_digest(code, self._code(key, value).encode()) else b""

    def _code(self, key: str, value: bytes) -> str:
        # The key is part of it: the record of one rank is none of another's.
        return hmac.new(self._secret, key.encode() + b"\0" + value, hashlib.sha256).hexdigest()


def open_store(
    rank: int, world_size: int, host: str, exchange: Exchange, timeout_s: float
) -> Store:
    """Rank 0 opens a store on a free port, the others connect to it; a collective.

    Every key is made to exist first, so that no read ever waits for one. Where all ranks are on
    one machine it listens on loopback alone. Elsewhere on every address: which of them the others
    take a name for is theirs to say.

    Args:
        rank: This process.
        world_size: All of them.
        host: Where the other ranks reach rank 0.
        exchange: Carries the port and the run's secret.
        timeout_s: Of one call.
    """
    machine: str = exchange.broadcast(this_machine())
    alone = exchange.largest(int(machine != this_machine())) == 0
    host = LOOPBACK if alone else host
    limit = timedelta(seconds=timeout_s)
    if rank != 0:
        port, secret = exchange.broadcast(None)
        return SignedStore(TCPStore(host, port, None, False, limit, wait_for_workers=False), secret)
    port, file = listen_at(LOOPBACK) if alone else (0, None)
    store = TCPStore(host, port, None, True, limit, wait_for_workers=False, master_listen_fd=file)
    for each in range(world_size):
        store.set(f"pulse/{each}", "")
    secret = secrets.token_bytes(32)
    exchange.broadcast((store.port, secret))
    return SignedStore(store, secret)


def this_machine() -> str:
    """What processes with the same loopback have in common: the boot, and the network's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # no Linux
        return platform.node()


class Kind(StrEnum):
    """How a wait ended."""

    READY = "ready"
    FAILED = "failed"  # what was waited for
    ERROR = "error"  # rank 0
    STOP = "stop"


class WaitOutcome(msgspec.Struct, frozen=True):
    """The end of one wait, published by rank 0.

    Attributes:
        sequence: Which wait, counted from 1 on every rank.
        kind: How it ended.
        what: What was waited for; differs between ranks only if they are out of step.
        text: The traceback (FAILED, ERROR) or the name of the signal (STOP).
        tick: The beat of rank 0 that first carried it; whoever has seen that beat has seen it.
    """

    sequence: int
    kind: Kind
    what: str
    text: str = ""
    tick: int = 0


class Failure(msgspec.Struct, frozen=True):
    """The first failure of the run: who, and its traceback or what was seen of it."""

    rank: int
    text: str


class Pulse(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One beat of one rank.

    Attributes:
        tick: Grows with every beat: the process is running.
        progress: Grows when the main thread passes a checkpoint: the program is running.
        name: Process id and host, for messages.
        what: What the main thread said it is doing.
        allowance_s: How long it said that it may be busy with it.
        stop: Name of the signal that asked this rank to stop, or empty.
        seen: The latest beat of rank 0 that this rank has read.
        closed: This rank left in good order.
        failure: The first failure known to this rank.
        outcomes: Rank 0 alone: the ends of recent waits, kept until every rank has read them.
    """

    tick: int = 0
    progress: int = 0
    name: str = ""
    what: str = "starting"
    allowance_s: float = 0.0
    stop: str = ""
    seen: int = 0
    closed: bool = False
    failure: Failure | None = None
    outcomes: tuple[WaitOutcome, ...] = ()


class Peer(msgspec.Struct, frozen=True):
    """Another rank as seen from here; times are of this process's `RunningClock`."""

    pulse: Pulse
    changed_at: float
    progress_at: float


class RunningClock:
    """A monotonic clock that does not count the time during which this process stood still.

    After SIGCONT, or a laptop's sleep, every other rank looks silent for as long as *we* were
    stopped. A gap between two readings that is longer than `gap_s` is therefore not counted.
    """

    def __init__(self, gap_s: float, time_source: Callable[[], float] = time.monotonic) -> None:
        self._gap_s = gap_s
        self._source = time_source
        self._lock = threading.Lock()
        self._last = time_source()
        self._elapsed = 0.0

    def now(self) -> float:
        """Seconds since the start, own standstill left out; to be called often."""
        with self._lock:
            instant = self._source()
            gap = instant - self._last
            self._last = instant
            self._elapsed += gap if gap <= self._gap_s else 0.0
            return self._elapsed


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


class RankLedger:
    """This rank's own record, the last ones read of the others, and which of them is lost.

    Shared between threads: records are replaced whole, under the lock of `changed`.

    Args:
        rank: This process; rank 0 watches all others, they watch rank 0.
        world_size: All of them.
        name: Of this process, for messages.
        rank_timeout_s: Silence after which a rank counts as lost.
        clock: What silence is measured by.

    Attributes:
        mine: The record that is written next.
        peers: The ranks that this one watches.
        failure: The first failure that was heard of from another rank.
        lost: Why the store can't be reached any more; empty while it can.
        processes: Rank 0: processes that it started itself, by rank.
        changed: Notified when something was heard.
    """

    def __init__(
        self, rank: int, world_size: int, name: str, rank_timeout_s: float, clock: RunningClock
    ) -> None:
        self.rank = rank
        self.rank_timeout_s = rank_timeout_s
        self.clock = clock
        self.mine = Pulse(name=name)
        now = clock.now()
        watched = range(1, world_size) if rank == 0 else (0,)
        self.peers: Mapping[int, Peer] = {peer: Peer(Pulse(), now, now) for peer in watched}
        self.failure: Failure | None = None
        self.lost = ""
        self.processes: dict[int, ProcessLike] = {}
        self.changed = threading.Condition()
        self._outcomes: dict[int, WaitOutcome] = {}

    def say(self, **changes: Any) -> int:
        """Change this rank's own record; returns the tick of the first beat that carries it."""
        with self.changed:
            self.mine = replace(self.mine, **changes)
            return self.mine.tick + 1

    def advance(self, what: str | None, allowance_s: float) -> None:
        """The main thread made progress and says what it does next (None: as before)."""
        with self.changed:
            what = self.mine.what if what is None else what
            self.say(progress=self.mine.progress + 1, what=what, allowance_s=allowance_s)

    def publish(self, outcome: WaitOutcome) -> int:
        """Rank 0: add the end of a wait to the record; returns the tick that carries it."""
        with self.changed:
            told = replace(outcome, tick=self.mine.tick + 1)
            return self.say(outcomes=(*self.mine.outcomes, told))

    def fail(self, failure: Failure) -> int:
        """Put a failure into the own record, unless an earlier one is there."""
        with self.changed:
            return self.say(failure=self.mine.failure or failure)

    def next_beat(self, stop: str = "") -> Pulse:
        """The record to write now, with the signal that this rank got."""
        with self.changed:
            mine = self.mine
            seen = self.peers[0].pulse.tick if self.rank != 0 else 0
            least = min((p.pulse.seen for p in self.peers.values()), default=0)
            unread = tuple(o for o in mine.outcomes if self.rank != 0 or o.tick > least)
            self.say(tick=mine.tick + 1, seen=seen, stop=stop, outcomes=unread)
            return self.mine

    def hear(self, pulses: Mapping[int, Pulse]) -> None:
        """Take in what was read from the store."""
        now = self.clock.now()
        with self.changed:
            for rank, pulse in pulses.items():
                old = self.peers[rank]
                if pulse.tick < old.pulse.tick:
                    continue  # an old record that somebody has put back
                changed_at = now if pulse.tick != old.pulse.tick else old.changed_at
                moved = pulse.progress != old.pulse.progress
                peer = Peer(pulse, changed_at, now if moved else old.progress_at)
                self.peers = {**self.peers, rank: peer}
                self._outcomes.update({o.sequence: o for o in pulse.outcomes})
                self.failure = self.failure or pulse.failure
            if self.rank == 0 and self.failure is not None:  # so that every rank hears of it
                self.fail(self.failure)
            self.changed.notify_all()

    def outcome(self, sequence: int) -> WaitOutcome | None:
        """How that wait ended, once rank 0 has said so; earlier ones are forgotten."""
        with self.changed:
            self._outcomes = {s: o for s, o in self._outcomes.items() if s >= sequence}
            return self._outcomes.get(sequence)

    def all_have_seen(self, tick: int) -> bool:
        """Rank 0: whether every rank that is still there has read that beat."""
        return all(p.pulse.closed or p.pulse.seen >= tick for p in self.peers.values())

    def rank_zero_left(self) -> bool:
        """Whether rank 0 said good-bye or can't be reached."""
        return bool(self.lost) or self.peers[0].pulse.closed

    # ---- who is lost -----------------------------------------------------------------------

    def heard(self) -> Failure | None:
        """A failure that some rank reported, this rank's own report left out."""
        failure = self.failure
        if failure is None or failure.rank != self.rank:
            return failure
        if self.mine.failure is not None:
            return None
        return Failure(failure.rank, f"the others gave up on this rank: {failure.text}")

    def verdict(self) -> Failure | None:
        """What is wrong with another rank, or None; rank 0 passes it on to all."""
        found = self.heard() or self._ended_child() or self._lost_store() or self._silent()
        if found is not None and self.rank == 0:
            self.fail(found)
        return found

    def stalled(self, since: float) -> Failure | None:
        """Whether rank 0's main thread stands still, seen by a rank that waits since then."""
        peer = self.peers[0]
        if peer.pulse.closed:
            return Failure(0, "left the run while this rank still waited for it")
        age_s = self.clock.now() - max(peer.progress_at, since)
        limit_s = peer.pulse.allowance_s + self.rank_timeout_s
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
        if not self.lost or self.peers[0].pulse.closed:
            return None
        return Failure(0, f"its process is gone ({self.peers[0].pulse.name}): {self.lost}")

    def _silent(self) -> Failure | None:
        now = self.clock.now()
        for rank, peer in self.peers.items():
            age_s = now - peer.changed_at
            if age_s > self.rank_timeout_s and not peer.pulse.closed:
                return Failure(
                    rank,
                    f"silent for {age_s:.1f} s ({peer.pulse.name or 'never heard of'}): killed, "
                    f"stopped or cut off; last known in: {peer.pulse.what}",
                )
        return None


log = logging.getLogger(__name__)

EXIT_RANK_LOST = 75
"""Exit status of a rank that was ended because another one failed (sysexits' EX_TEMPFAIL)."""

_RESTING_S = 0.5
_WAITING_S = 0.01
_LAST_CALL_S = 10.0


class Heart:
    """Writes this rank's record and reads the others', for as long as the run lasts.

    A store call blocks for good while rank 0's process is stopped, so no other thread makes one;
    the others look at the age of what was read. Torch releases the GIL during the call.

    Args:
        ledger: Where records are kept.
        store: Reached by every rank; lives in rank 0's process.
        stop_source: The name of the signal that this rank got, or an empty string.
    """

    def __init__(self, ledger: RankLedger, store: Store, stop_source: Callable[[], str]) -> None:
        self._ledger = ledger
        self._store = store
        self._stop_source = stop_source
        self._resting_s = min(_RESTING_S, ledger.rank_timeout_s / 10)
        self._waiting_s = max(_WAITING_S, len(ledger.peers) * 0.0005)
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
        # Long, for busy machines: one whose call returns while Python ends is an abort of the whole
        # process ("terminate called without an active exception"), whatever its exit status was.
        self._thread.join(timeout=_LAST_CALL_S)

    def _run(self) -> None:
        ledger = self._ledger
        keys = {rank: f"pulse/{rank}" for rank in ledger.peers}
        while not self._end.is_set():
            try:
                beat = ledger.next_beat(self._stop_source())
                self._store.set(f"pulse/{ledger.rank}", msgspec.json.encode(beat).decode())
                values = self._store.multi_get(list(keys.values()))
            except RuntimeError as error:  # torch's DistError: the process with the store is gone
                ledger.lost = str(error).splitlines()[0]
                return
            read = {rank: self._read(rank, v) for rank, v in zip(keys, values, strict=True)}
            ledger.hear({rank: pulse for rank, pulse in read.items() if pulse is not None})
            self._wake.wait(self._waiting_s if self._busy else self._resting_s)
            self._wake.clear()

    def _read(self, rank: int, data: bytes) -> Pulse | None:
        """A rank's record; None where there is none, or somebody else has written over it."""
        try:
            return msgspec.json.decode(data, type=Pulse)
        except (msgspec.DecodeError, ValueError):  # ValueError: of bytes that are no text
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
        ledger: Knows what is wrong with another rank.
        grace_s: Time for the main thread once that is known.
        poll_s: How often to look.
    """

    def __init__(self, ledger: RankLedger, grace_s: float, poll_s: float) -> None:
        self._ledger = ledger
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
        while (failure := self._ledger.verdict()) is None:
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
        sys.stderr.write(f"[rank {self._ledger.rank}] {text}\n")
        sys.stderr.flush()
