"""What a rank says about itself, and what it has heard from the others.

Everything that ranks tell each other outside of collectives is one small record per rank, written
again and again under one key of a store. Nobody ever waits for a key: a reader looks at the last
record and at how long ago it changed, by its own clock.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """How a wait ended."""

    READY = "ready"
    ERROR = "error"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one wait, published by rank 0.

    Attributes:
        sequence: Which wait, counted from 1 on every rank.
        kind: How it ended.
        what: What was waited for; differs between ranks only if they are out of step.
        text: The traceback (ERROR) or the name of the signal (STOP).
        tick: The beat of rank 0 that first carried it; whoever has seen that beat has seen it.
    """

    sequence: int
    kind: Kind
    what: str
    text: str = ""
    tick: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """The first failure of the run: who, and its traceback or what was seen of it."""

    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class Pulse:
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
    outcomes: tuple[Outcome, ...] = ()

    def encode(self) -> str:
        """The record as it lies in the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(data: bytes) -> Pulse:
        """Read what `encode` wrote."""
        fields: dict[str, Any] = json.loads(data)
        failure = fields.pop("failure")
        outcomes = fields.pop("outcomes")
        return Pulse(
            **fields,
            failure=Failure(**failure) if failure else None,
            outcomes=tuple(Outcome(**{**o, "kind": Kind(o["kind"])}) for o in outcomes),
        )


@dataclass(frozen=True, slots=True)
class Peer:
    """Another rank as seen from here; times are of this process's `RunningClock`."""

    pulse: Pulse
    changed_at: float
    progress_at: float

    def update(self, pulse: Pulse, now: float) -> Peer:
        """Take in a newly read record."""
        return Peer(
            pulse=pulse,
            changed_at=now if pulse.tick != self.pulse.tick else self.changed_at,
            progress_at=now if pulse.progress != self.pulse.progress else self.progress_at,
        )


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


class Ledger:
    """This rank's own record and the last ones read of the others; shared between threads."""

    def __init__(self, rank: int, world_size: int, name: str, clock: RunningClock) -> None:
        self.rank = rank
        self.world_size = world_size
        self.clock = clock
        self.lost: str = ""
        self.changed = threading.Condition()
        self._mine = Pulse(name=name)
        self._outcomes: dict[int, Outcome] = {}
        self._failure: Failure | None = None
        now = clock.now()
        watched = range(1, world_size) if rank == 0 else (0,)
        self._peers = {peer: Peer(Pulse(), now, now) for peer in watched}

    @property
    def mine(self) -> Pulse:
        """The record that will be written next."""
        return self._mine

    @property
    def peers(self) -> Mapping[int, Peer]:
        """The ranks that this one watches: rank 0 watches all, the others watch rank 0."""
        with self.changed:
            return dict(self._peers)

    @property
    def failure(self) -> Failure | None:
        """The first failure that was heard of from another rank."""
        return self._failure

    def outcome(self, sequence: int) -> Outcome | None:
        """How that wait ended, once rank 0 has said so; earlier ones are forgotten."""
        with self.changed:
            self._outcomes = {s: o for s, o in self._outcomes.items() if s >= sequence}
            return self._outcomes.get(sequence)

    def say(self, **changes: Any) -> int:
        """Change this rank's own record; returns the tick of the first beat that carries it."""
        with self.changed:
            self._mine = replace(self._mine, **changes)
            return self._mine.tick + 1

    def advance(self, what: str | None, allowance_s: float) -> None:
        """The main thread made progress and says what it does next (None: as before)."""
        with self.changed:
            mine = self._mine
            what = mine.what if what is None else what
            self._mine = replace(
                mine, progress=mine.progress + 1, what=what, allowance_s=allowance_s
            )

    def publish(self, outcome: Outcome) -> int:
        """Rank 0: add the end of a wait to the record; returns the tick that carries it."""
        with self.changed:
            tick = self._mine.tick + 1
            kept = (*self._mine.outcomes, replace(outcome, tick=tick))
            self._mine = replace(self._mine, outcomes=kept)
            return tick

    def fail(self, failure: Failure) -> int:
        """Put a failure into the own record, unless an earlier one is there."""
        return self.say(failure=self._mine.failure or failure)

    def next_beat(self, stop: str = "") -> Pulse:
        """The record to write now, with the signal that this rank got."""
        with self.changed:
            seen = self._peers[0].pulse.tick if self.rank != 0 else 0
            least = min((p.pulse.seen for p in self._peers.values()), default=0)
            unread = tuple(o for o in self._mine.outcomes if self.rank != 0 or o.tick > least)
            self._mine = replace(
                self._mine, tick=self._mine.tick + 1, seen=seen, stop=stop, outcomes=unread
            )
            return self._mine

    def hear(self, pulses: Mapping[int, Pulse]) -> None:
        """Take in what was read from the store."""
        now = self.clock.now()
        with self.changed:
            for rank, pulse in pulses.items():
                if pulse.tick < self._peers[rank].pulse.tick:
                    continue  # an old record that somebody has put back
                self._peers[rank] = self._peers[rank].update(pulse, now)
                self._outcomes.update({o.sequence: o for o in pulse.outcomes})
                self._failure = self._failure or pulse.failure
            if self.rank == 0 and self._failure is not None:  # so that every rank hears of it
                self._mine = replace(self._mine, failure=self._mine.failure or self._failure)
            self.changed.notify_all()

    def lose(self, reason: str) -> None:
        """The store can't be reached any more."""
        with self.changed:
            self.lost = reason
            self.changed.notify_all()

    def all_have_seen(self, tick: int) -> bool:
        """Rank 0: whether every rank that is still there has read that beat."""
        peers = self.peers.values()
        return all(p.pulse.closed or p.pulse.seen >= tick for p in peers)

    def rank_zero_left(self) -> bool:
        """Whether rank 0 said good-bye or can't be reached."""
        return bool(self.lost) or self.peers[0].pulse.closed

    def rank_zero_knows_failure(self) -> bool:
        """Whether rank 0 repeats a failure, or can't be reached."""
        return self.rank_zero_left() or self.peers[0].pulse.failure is not None
