"""One server as the pool knows it: its state, its requests, and who gets the next one.

Which request goes to which server, and when.

Evaluation goes first, then requests that were interrupted (they hold the oldest tokens), then
fresh ones; within a class first come, first served. A request goes to the server that its group
used before (the prompt's prefix is cached there) unless that one is much busier than the least
loaded. What may leave at once, after an update or at the start, leaves in slices: ten thousand
requests would hold the event loop for seconds.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path

import anyio

from lightning_grpo.errors import ReplyError
from lightning_grpo.serving.client import LONGEST_WAIT_S, ServerClient, growing
from lightning_grpo.serving.event_loop import in_turns
from lightning_grpo.serving.fitness import ServerFacts
from lightning_grpo.types import NO_VERSION

CLOCK_S = 0.01
"""A timer may be early by so much."""


TAIL_LINES = 25
TAIL_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A server that answers.

    Attributes:
        url: `http://host:port`.
        pid: Its process, where it runs on this machine and the run started it.
        log_path: Its output, where the run started it.
        devices: The GPUs that it uses.
    """

    url: str
    pid: int | None = None
    log_path: Path | None = None
    devices: tuple[int, ...] = ()

    def log_tail(self) -> str:
        """The end of its log; empty where there is none."""
        return read_tail(self.log_path) if self.log_path is not None else ""

    def describe(self) -> str:
        """One line: address, process, GPUs, log."""
        parts = [self.url]
        if self.pid is not None:
            parts.append(f"pid {self.pid}")
        if self.devices:
            parts.append("GPU " + ",".join(map(str, self.devices)))
        if self.log_path is not None:
            parts.append(f"log {self.log_path}")
        return "  ".join(parts)


def read_tail(path: Path, num_lines: int = TAIL_LINES) -> str:
    """The last lines of a file; empty if it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])


class MemberState(StrEnum):
    """Whether the server's weights are known."""

    CLEAN = "clean"
    UPDATING = "updating"
    DIRTY = "dirty"
    DEAD = "dead"


@dataclass(eq=False, slots=True)
class Held:
    """One request that a server holds, for as long as its exchange lasts.

    Attributes:
        since_s: When it was sent, on the server's clock of service.
        allowed_s: How long it may take, on the same clock.
        rids: Names of all requests of the exchange; those that join later are added.
        scope: Cancelled when the server is given up.
        called_back_s: When it was called back for being late; None: it was not.
        given_up: Nothing of it is taken any more.
    """

    since_s: float
    allowed_s: float
    rids: Sequence[str]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    called_back_s: float | None = None
    given_up: bool = False


class Member:
    """One slot of the pool; the server in it may be replaced by a restart.

    Attributes:
        slot: Position in the pool, which a restart keeps.
        state: Only a `clean` server is routed to.
        version: The weights that a clean server holds; the ones it held before, otherwise.
        reason: Why it is dirty or dead.
        suspect: A request failed on it; not routed to until it answers a health check.
        paused: It was told to hold requests back.
        released: It gave its GPU memory back.
        renewed: It is, for all that is known, another process than before.
        in_flight: Requests of the pool that it holds.
        bound: The most requests that it is given at once.
        room: The same where it said that it is busy: grows again as replies come.
        busy: It asked for a pause, which lasts.
        answered_s: When it last sent a token, on its clock of service.
    """

    def __init__(
        self, slot: int, handle: ServerHandle, client: ServerClient, facts: ServerFacts, bound: int
    ) -> None:
        self.slot = slot
        self.bound = bound
        self.in_flight = 0
        self.drained = anyio.Event()
        self._idle_s = 0.0
        self._idle_since = time.monotonic()
        self.answered_s = -math.inf
        self._service_s = 0.0
        self._serves_since: float | None = None
        self._faults_s: list[float] = []
        self._held: set[Held] = set()
        self.replace(handle, client, facts)

    def replace(self, handle: ServerHandle, client: ServerClient, facts: ServerFacts) -> None:
        """Puts a (re)started server into the slot; it is dirty until its weights are known."""
        self.handle = handle
        self.client = client
        self.facts = facts
        self.state = MemberState.DIRTY
        self.version = NO_VERSION
        self.reason = "its weights were not checked yet"
        self.suspect = False
        self.num_failed_checks = 0
        self.num_suspicions = 0
        self.paused = False
        self.released = False
        self.renewed = True
        self.busy = False
        self.room = self.bound
        self._busy_since: float | None = None
        self._busy_until = 0.0
        self._busy_waits = growing(0.25, LONGEST_WAIT_S)
        self._labels: dict[str, int] = {}
        self._settled = anyio.Event()
        self._count_service()

    def __repr__(self) -> str:
        return f"Member({self.describe()})"

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self.handle.url.rstrip("/")

    @property
    def update_session(self) -> bool:
        """Whether tensor updates must be framed by begin and end."""
        return self.facts.dialect.update_session

    @property
    def tp_size(self) -> int:
        """How many ranks of the server join a weight group."""
        return self.facts.info.tp_size

    @property
    def caches_prefixes(self) -> bool:
        """Whether it keeps what it computed of prompts (as SGLang does unless told not to)."""
        return self.facts.info.disable_radix_cache is not True

    @property
    def precision(self) -> str:
        """What it computes in, by its own name: `bfloat16`, `fp8`, ..."""
        return self.facts.info.precision

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on a CPU, whatever the trainer does."""
        return self.facts.info.device == "cpu"

    @property
    def alive(self) -> bool:
        """Whether it can be talked to."""
        return self.state is not MemberState.DEAD

    @property
    def routable(self) -> bool:
        """Whether requests may be sent to it."""
        return self.state is MemberState.CLEAN and not (self.suspect or self.busy)

    @property
    def service_s(self) -> float:
        """How long it could answer, since it was added: clean, and not paused."""
        since = self._serves_since
        return self._service_s + (0.0 if since is None else time.monotonic() - since)

    @property
    def late(self) -> Held | None:
        """The request that is over its time by most, if one is."""
        now = self.service_s
        longest = max(self._held, key=lambda h: now - h.since_s - h.allowed_s, default=None)
        if longest is None or now - longest.since_s <= longest.allowed_s:
            return None
        return longest

    @property
    def idle_s(self) -> float:
        """How long it had no request of the pool, since it was added."""
        now = time.monotonic() - self._idle_since if self.in_flight == 0 else 0.0
        return self._idle_s + now

    def take(self) -> None:
        """A request is given to it."""
        self._idle_s = self.idle_s
        self.in_flight += 1

    def give_back(self) -> None:
        """A request has ended, well or not."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle_since = time.monotonic()
            self.drained.set()
            self.drained = anyio.Event()

    def describe(self) -> str:
        """`url clean(3)` or `url dirty: reason`, for messages."""
        if self.state is MemberState.CLEAN:
            return f"{self.url} clean({self.version})"
        return f"{self.url} {self.state}" + (f": {self.reason}" if self.reason else "")

    def mark_updating(self) -> None:
        """From here on its weights are unknown until `mark_clean`."""
        self.state = MemberState.UPDATING
        self.reason = ""
        self._count_service()

    def expect(self, version: int, label: str) -> None:
        """It is about to get the weights of `version`, which it will call `label`."""
        self._labels[label] = version
        for old in list(self._labels)[:-64]:
            del self._labels[old]

    def mark_clean(self, version: int, label: str) -> None:
        """It holds the weights of `version`, which it calls `label`."""
        self.state = MemberState.CLEAN
        self.version = version
        self.reason = ""
        # One name for each version: a server that restarts on its own has the name from before.
        self._labels = {name: v for name, v in self._labels.items() if v != version}
        self.expect(version, label)
        self._count_service()
        self._settle()

    async def settled(self) -> None:
        """Waits while its weights are being changed: until they are proved, or given up."""
        while self.state is MemberState.UPDATING:
            await self._settled.wait()

    def mark_dirty(self, reason: str) -> None:
        """Its weights are unknown: whatever it holds of ours is sent elsewhere."""
        if self.state is not MemberState.DEAD:
            self._mark_out(MemberState.DIRTY, reason)

    def mark_dead(self, reason: str) -> None:
        """It is gone, or as good as gone."""
        self._mark_out(MemberState.DEAD, reason)

    def _mark_out(self, state: MemberState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._count_service()
        for held in self._held:
            held.given_up = True
        in_turns([held.scope.cancel for held in self._held])
        self._settle()

    def count_fault(self, forgiven_after_s: float) -> int:
        """It died, or can't be trusted; how often that was within so many seconds of service."""
        now = self.service_s
        self._faults_s = [s for s in self._faults_s if now - s < forgiven_after_s] + [now]
        return len(self._faults_s)

    def put_off(self, wait_s: float | None) -> float | None:
        """It wants no request for a while.

        Args:
            wait_s: What it asks for; None: it does not say.

        Returns:
            Seconds until it may be asked again; None where an answer like this one said so.
        """
        self.room = max(1, min(self.room, self.in_flight - 1))
        now = time.monotonic()
        self._busy_since = self._busy_since or now
        if self.busy and (wait_s or 0.0) <= self._busy_until - now:
            return None
        self.busy, wait_s = True, wait_s or next(self._busy_waits)
        self._busy_until = now + wait_s
        return wait_s

    @property
    def busy_s(self) -> float:
        """For how long it has said nothing else than that it is busy."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def end_of_pause(self) -> bool:
        """Whether the pause that it asked for is over; it may be asked again then."""
        self.busy = self.busy and time.monotonic() < self._busy_until - CLOCK_S
        return not self.busy

    def answered(self) -> None:
        """A request was answered well: what was held against it is forgotten."""
        self.answered_s = self.service_s
        self.num_suspicions = 0
        if self.room < self.bound:
            self.room += 1
            self._busy_since = None
            self._busy_waits = growing(0.25, LONGEST_WAIT_S)

    def version_of(self, label: str) -> int:
        """The version of a label that the server reports.

        Raises:
            ReplyError: The label is none that was published to it: someone else changed it.
        """
        version = self._labels.get(label)
        if version is None:
            raise ReplyError(
                f"{self.url} answers with weights {label!r}, which this run did not publish"
                " (is another run using the same server?)"
            )
        return version

    async def pause(self, mode: str = "retract") -> None:
        """Stops the server between two tokens; it holds requests back until `unpause`."""
        await self.client.pause(mode)
        self.paused = True
        self._count_service()

    async def unpause(self) -> None:
        """Lets the server work again."""
        await self.client.resume()
        self.paused = False
        self._count_service()

    async def release_memory(self) -> None:
        """Has the server give its GPU memory back, weights and all."""
        self.released = True
        await self.client.release_memory()

    async def resume_memory(self) -> None:
        """Has it take its memory again; the weights are undefined until an update."""
        await self.client.resume_memory()
        self.released = False

    def hold(self, allowed_s: float, rids: Sequence[str]) -> Held:
        """A request is sent to it; `forget` it afterwards."""
        held = Held(self.service_s, allowed_s, rids)
        self._held.add(held)
        return held

    def forget(self, held: Held) -> None:
        """The request has ended, well or not."""
        self._held.discard(held)

    def call_back(self, late: Held) -> None:
        """All requests of a late one's exchange are being called back."""
        for held in self._held:
            if held.rids is late.rids:
                held.called_back_s = self.service_s

    def _count_service(self) -> None:
        self._service_s = self.service_s
        serves = self.state is MemberState.CLEAN and not self.paused
        self._serves_since = time.monotonic() if serves else None

    def _settle(self) -> None:
        self._settled.set()
        self._settled = anyio.Event()


AFFINITY_SLACK = 8
"""How many more requests than the least loaded a group's own server may hold."""
REMEMBERED_GROUPS = 8192
SLICE = 16
"""So many requests leave in one turn of the event loop; those of one group leave together."""


class Rank(IntEnum):
    """Order of service."""

    PRIORITY = 0
    CONTINUED = 1
    FRESH = 2


Waiter = tuple[int, int, Hashable, Member | None, "asyncio.Future[Member]"]


class Router:
    """Hands servers to waiting requests; nothing here blocks, all of it runs on one loop.

    Args:
        members: The pool's servers; their states change under the router, which is told by
            `dispatch`.
        most: Requests that all servers together may hold; None: no limit.

    Attributes:
        error: Why no request can be served any more.
    """

    def __init__(self, members: Sequence[Member], most: int | None = None) -> None:
        self._members = members
        self._most = math.inf if most is None else most
        self._room = self._most
        self._num_out = 0
        self._left_this_turn = 0
        self._last_key: Hashable = None
        self._waiters: list[Waiter] = []
        self._ticket = itertools.count()
        self._homes: OrderedDict[Hashable, int] = OrderedDict()
        self.error: Exception | None = None
        self.closed = False

    @property
    def num_waiting(self) -> int:
        """Requests that no server has taken yet."""
        return sum(not future.done() for *_, future in self._waiters)

    async def acquire(self, group_key: Hashable, rank: Rank, avoid: Member | None = None) -> Member:
        """Waits for a server with room; unblocked by `dispatch`, `release` and `fail`.

        Args:
            group_key: Requests of one key prefer one server.
            rank: Its place in the order of service.
            avoid: A server that has failed the request: taken only if there is no other.
        """
        if self.error is not None:
            raise self.error
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (rank, next(self._ticket), group_key, avoid, future))
        self.dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())
            raise

    def release(self, member: Member) -> None:
        """The request has ended, well or not; its place is free."""
        self._num_out -= 1
        member.give_back()
        self.dispatch()

    def shrink(self) -> None:
        """This process can't have as many connections as there are requests out."""
        self._room = max(1, min(self._room, self._num_out - 1))

    def answered(self) -> None:
        """A connection is free again: one more may be tried."""
        self._room = min(self._most, self._room + 1)

    def close(self) -> None:
        """Hands nothing out until `open`."""
        self.closed = True

    def open(self) -> None:
        """Hands servers out again."""
        self.closed = False
        self.dispatch()

    def fail(self, error: Exception) -> None:
        """Every request that waits or will come raises the first error given."""
        self.error = error = self.error or error
        waiters, self._waiters = self._waiters, []
        for *_, future in waiters:
            if not future.done():
                future.set_exception(error)

    def dispatch(self) -> None:
        """Gives waiting requests to servers with room, in order; the rest in the turns to come."""
        while self._waiters and not self.closed:
            *_, group_key, avoid, future = self._waiters[0]
            if not future.done():
                together = group_key is not None and group_key == self._last_key
                if self._left_this_turn >= SLICE and not together:
                    return
                member = self._choose(group_key, avoid)
                if member is None:
                    return
                self._last_key = group_key
                self._leave(member)
                future.set_result(member)
            heapq.heappop(self._waiters)

    def _leave(self, member: Member) -> None:
        member.take()
        self._num_out += 1
        self._left_this_turn += 1
        if self._left_this_turn == 1:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._left_this_turn = 0
        self.dispatch()

    def _choose(self, group_key: Hashable, avoid: Member | None) -> Member | None:
        if self._num_out >= self._room:
            return None
        free = [m for m in self._members if m.in_flight < m.room and m.routable]
        if avoid is not None and len(free) > 1:
            free = [m for m in free if m is not avoid]
        if not free:
            return None
        least = min(free, key=lambda m: (m.in_flight / m.bound, m.slot))
        if group_key is None:
            return least
        home = self._homes.get(group_key)
        chosen = next((m for m in free if m.slot == home), least)
        if chosen.in_flight - least.in_flight > AFFINITY_SLACK:
            chosen = least
        self._homes[group_key] = chosen.slot
        self._homes.move_to_end(group_key)
        if len(self._homes) > REMEMBERED_GROUPS:
            self._homes.popitem(last=False)
        return chosen
