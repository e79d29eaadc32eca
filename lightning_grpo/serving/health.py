"""Which server gets a request: the order of service, servers brought back, standstill for updates.

Evaluation goes first, then requests that were interrupted (they hold the oldest tokens), then fresh
ones; within a class first come, first served. A request goes to the server that its group used
before (the prompt's prefix is cached there) unless that one is much busier than the least loaded.
What may leave at once, after an update or at the start, leaves in slices: ten thousand requests
would hold the event loop for seconds.

One task watches each server and brings it back if it died, fell silent or lied. What it does with
one that is out depends on what is known:

- its process has ended, or it is ours, on this machine, and silent: it is started again;
- it answers, but its weights are unknown, or it sent what can't be: it is proved again;
- it is elsewhere and can't be reached: it is asked again for `patience_s`; then it is started again
  where the run may do that, and else it is missing, and asked all the same.

In each case it gets the current weights and proves them before it is routed to.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import anyio
import anyio.abc
import psutil

from lightning_grpo.errors import (
    ConfigError,
    GRPOError,
    OwnLimitError,
    ServerError,
    ServersLostError,
    WeightSyncError,
)
from lightning_grpo.serving.client import growing
from lightning_grpo.serving.server import Held, Member, MemberState, ServerHandle
from lightning_grpo.types import Interruption, InterruptionChoice

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
                future.result().answer()
                self.release(future.result())
            raise

    def release(self, member: Member, *, comes_back: bool = False) -> None:
        """The request has ended, well or not; its place is free.

        Args:
            member: Where it was.
            comes_back: Whether it asks for a place at once, which others get only after it.
        """
        self._num_out -= 1
        member.give_back()
        if not comes_back:
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


# -- bringing servers back -------------------------------------------------------------------------

logger = logging.getLogger(__name__)

PROOFS = 3
"""A server that fails its proof so often is started again where that is possible, else lost."""

SUSPICIONS = 3
"""Requests may fail so often in a row on a server that is healthy, before it is proved again."""

GONE = "is gone"


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """How soon a server counts as lost, and what then.

    Attributes:
        interval_s: Between two looks at a server.
        check_timeout_s: Longest health check.
        failed_checks: Checks failed in a row that make a server silent.
        patience_s: How long a server whose process can't be looked at may be silent, or may fail
            its proofs, before it is started again or lost.
        max_restarts: Of a server; one more death, or reply that can't be, loses it.
        forgiven_after_s: Each is forgotten after so many seconds of service; not where it was asked
            and answered nothing.
        min_servers: The run ends when fewer are left.
        longest_pause_s: Between two attempts to bring back a server that answers.
        call_back_s: How long a server may take to give back a request that is late.
    """

    interval_s: float = 1.0
    check_timeout_s: float = 10.0
    failed_checks: int = 3
    patience_s: float = 300.0
    max_restarts: int = 3
    forgiven_after_s: float = 60.0
    min_servers: int = 1
    longest_pause_s: float = 15.0
    call_back_s: float = 10.0


Restart = Callable[[str], Awaitable[ServerHandle]]

Restore = Callable[[Member], Awaitable[None]]

IsGone = Callable[[str], Awaitable[bool]]


class Monitor:
    """Watches members in the background; runs as one task of the pool.

    Args:
        members: The pool's servers.
        policy: The limits.
        restart: Starts the server of a URL again; None where the run did not start it.
        revive: Connects a server that answers (again) and brings it to the current weights.
        updating: Whether somebody else is changing the servers' weights.
        changed: Called when a server became routable, or is lost for good.
        lost: Called once with the error that ends the run.

    Attributes:
        is_gone: Tells whether the process of the server at a URL has ended; None: nobody can.
    """

    def __init__(
        self,
        members: Sequence[Member],
        policy: HealthPolicy,
        restart: Restart | None,
        *,
        revive: Callable[[Member, ServerHandle], Awaitable[None]],
        updating: Callable[[], bool],
        changed: Callable[[], None],
        lost: Callable[[Exception], None],
    ) -> None:
        self._members = members
        self._policy = policy
        self._restart = restart
        self.is_gone: IsGone | None = None
        self._revive = revive
        self._updating = updating
        self._changed = changed
        self._lost = lost
        self._tasks: anyio.abc.TaskGroup | None = None
        self._watches: dict[int, anyio.CancelScope] = {}
        self._wakes: dict[int, anyio.Event] = {}
        self._given_up: set[int] = set()
        self._missing: set[int] = set()

    @property
    def can_restart(self) -> bool:
        """Whether the run started the servers itself."""
        return self._restart is not None

    @property
    def patience_s(self) -> float:
        """How long a server may stay away."""
        return self._policy.patience_s

    def may_return(self, member: Member) -> bool:
        """Whether a server that is not clean may become so without another update."""
        return member.slot not in self._given_up | self._missing

    def wake(self, member: Member) -> None:
        """Looks at a server now."""
        if member.slot in self._wakes:
            self._wakes[member.slot].set()

    def suspect(self, member: Member, error: Exception) -> None:
        """A request failed on it: look now, and route nothing to it until it answers."""
        if member.suspect or member.state is not MemberState.CLEAN:
            return
        member.num_suspicions += 1
        if member.num_suspicions > SUSPICIONS:
            self.distrust(member, f"{member.num_suspicions} times in a row: {error}")
            return
        member.suspect = True
        member.reason = member.reason or str(error)
        logger.info("server %d at fault: %s", member.slot, error)
        self.wake(member)

    def distrust(self, member: Member, reason: str) -> None:
        """It did what a server must not do: it is proved again before it is used."""
        if member.state is MemberState.CLEAN:
            member.mark_dirty(reason)
            self._count_fault(member)
            self.wake(member)

    def _count_fault(self, member: Member) -> None:
        policy = self._policy
        faults = member.count_fault(policy.forgiven_after_s)
        if faults > policy.max_restarts:
            self._lose(
                member,
                f"it failed {faults} times within {policy.forgiven_after_s:g} s of service, or "
                "without an answer in between",
                self._given_up,
            )

    async def run(self) -> None:
        """Watches every server until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            for member in self._members:
                self.watch(member)
            await anyio.sleep_forever()

    def watch(self, member: Member) -> None:
        """Watches one more server, which the members hold by now; while `run` does."""
        assert self._tasks is not None, "nobody watches"
        self._watches[member.slot] = anyio.CancelScope()
        self._tasks.start_soon(self._watch, member, self._tasks)

    def unwatch(self, member: Member) -> None:
        """Watches a server no more, and forgets what was held against it."""
        self._watches.pop(member.slot).cancel()
        self._given_up.discard(member.slot)
        self._missing.discard(member.slot)

    async def _watch(self, member: Member, tasks: anyio.abc.TaskGroup) -> None:
        with self._watches[member.slot]:
            await self._mind(member, tasks)

    async def _mind(self, member: Member, tasks: anyio.abc.TaskGroup) -> None:
        self._wakes[member.slot], was_dirty = anyio.Event(), False
        while member.slot not in self._given_up:
            # A server is dirty for a moment between two attempts of an update, and while all stand
            # still for one, the publisher has it in hand.
            dirty = member.state is MemberState.DIRTY and not self._updating()
            if not member.alive or (dirty and was_dirty):
                await self._bring_back(member)
                dirty = False
            elif not dirty:
                self._mind_late(member, tasks)
                await self._check(member)
            was_dirty = dirty
            await self._pause(member, self._policy.interval_s)

    async def _pause(self, member: Member, longest_s: float) -> None:
        with anyio.move_on_after(longest_s):
            await self._wakes[member.slot].wait()
        self._wakes[member.slot] = anyio.Event()

    async def _check(self, member: Member) -> None:
        pid = member.handle.pid
        if pid is not None and not process_alive(pid):
            member.mark_dead(f"its process {pid} {GONE}")
        elif member.state is MemberState.UPDATING:
            return  # An update has deadlines of its own.
        elif member.suspect or member.paused or self._is_quiet(member):
            # SGLang's health check wants a token, which a paused server doesn't give.
            paused = member.paused
            answers = member.client.listens if paused else member.client.healthy
            try:
                passed = await answers(self._policy.check_timeout_s)
            except OwnLimitError:
                return  # Nobody was asked.
            if passed:
                self._passed(member)
            elif paused or not member.paused:  # or a pause held it back, which says nothing
                self._failed(member)

    def _is_quiet(self, member: Member) -> bool:
        """Whether it has not just proved its health by an answer."""
        return member.service_s - member.answered_s > self._policy.interval_s

    def _failed(self, member: Member) -> None:
        member.suspect = True
        member.num_failed_checks += 1
        if member.alive and member.num_failed_checks >= self._policy.failed_checks:
            failed = f"{member.num_failed_checks} health checks failed: {member.client.trouble}"
            member.mark_dead(f"{member.reason}; {failed}" if member.reason else failed)

    def _passed(self, member: Member) -> None:
        member.num_failed_checks = 0
        if member.suspect:
            member.suspect = False
            if member.reason:
                logger.warning("server %d is used again: %s", member.slot, member.reason)
                member.reason = ""
            self._changed()

    def _mind_late(self, member: Member, tasks: anyio.abc.TaskGroup) -> None:
        """Calls back the request that is late by most; a server that keeps it can't be trusted.

        One that is merely slow gives it back with its tokens, so nothing is lost by asking.
        """
        late = member.late
        if late is None:
            return
        if late.called_back_s is None:
            member.call_back(late)
            tasks.start_soon(self._call_back, member, late)
        elif member.service_s - late.called_back_s > self._policy.call_back_s:
            self.distrust(
                member,
                f"it did not answer a request within {late.allowed_s:.0f} s, nor give it back",
            )

    async def _call_back(self, member: Member, late: Held) -> None:
        with anyio.move_on_after(self._policy.call_back_s):
            for rid in list(late.rids):
                try:
                    await member.client.abort(rid)
                except ServerError as error:
                    logger.info("%s", error)
                    return

    async def _bring_back(self, member: Member) -> None:
        """Until it serves again, or is lost for good."""
        self._say_if_ended(member)
        since, reason, proofs = anyio.current_time(), member.reason, 0
        pauses = growing(self._policy.interval_s / 2, self._policy.longest_pause_s)
        replace = not member.alive and await self._has_ended(member)
        self._tell_out(member, replace)
        while not replace or self._may_replace(member):
            error = await self._attempt(member, replace)
            if error is None:
                self._tell_back(member, anyio.current_time() - since)
                return
            member.mark_dead(f"{reason}; {error}")
            silent = isinstance(error, SilentError)
            proofs += isinstance(error, WeightSyncError)
            over = anyio.current_time() - since > self._policy.patience_s
            if self._restart is not None:
                replace = replace or over or proofs >= PROOFS
            elif proofs >= PROOFS:
                self._lose(member, f"it failed its proof {proofs} times", self._given_up)
                return
            elif over:
                self._lose(member, f"it was away for {self._policy.patience_s:g} s", self._missing)
            replace = replace or (silent and await self._has_ended(member))
            # To ask is cheap, and whoever comes back is at work again at once.
            await self._pause(member, self._policy.interval_s if silent else next(pauses))

    def _say_if_ended(self, member: Member) -> None:
        """A request may fail on a dead process before a look at the process finds it gone."""
        pid = member.handle.pid
        if pid is not None and not process_alive(pid) and GONE not in member.reason:
            member.reason = f"its process {pid} {GONE}; {member.reason}"

    async def _has_ended(self, member: Member) -> bool:
        """Whether a silent server is taken for dead."""
        if member.handle.pid is not None:
            return True  # ours, and on this machine
        if self._restart is None:
            return False
        return self.is_gone is None or await self.is_gone(member.url)

    def _may_replace(self, member: Member) -> bool:
        if self._restart is None:
            self._lose(member, "it can't be started again from here", self._given_up)
        else:
            self._count_fault(member)
        return member.slot not in self._given_up

    async def _attempt(self, member: Member, replace: bool) -> Exception | None:
        """Starts it again, or asks it; brings it to the current weights if it answers."""
        handle = member.handle
        try:
            if replace:
                assert self._restart is not None
                handle = await self._restart(member.url)
            elif not await member.client.listens(self._policy.check_timeout_s):
                return SilentError(member.client.trouble)
            await self._revive(member, handle)
        except (GRPOError, TimeoutError, OSError) as error:
            return error
        return None

    def _tell_out(self, member: Member, replace: bool) -> None:
        will = f"asked again for up to {self._policy.patience_s:g} s"
        if member.state is MemberState.DIRTY:
            will = "proved again"
        elif replace:
            will = "started again"
        logger.warning("server %d is out, and %s: %s", member.slot, will, member.describe())

    def _tell_back(self, member: Member, away_s: float) -> None:
        self._missing.discard(member.slot)
        if member.state is MemberState.CLEAN:
            logger.warning(
                "server %d is back after %.0f s: %s", member.slot, away_s, member.describe()
            )

    def _lose(self, member: Member, why: str, among: set[int]) -> None:
        member.mark_dead(member.reason)
        if not self.may_return(member):
            among.add(member.slot)
            return
        before = [m for m in self._members if not self.may_return(m)]
        among.add(member.slot)
        left = len(self._members) - len(before) - 1
        lost = f"Server {member.url} is lost: {why} ({member.reason}); {left} of"
        lost += f" {len(self._members)} servers are left"
        if left >= self._policy.min_servers:
            logger.error("%s", lost)
            self._changed()
            return
        lost += f", at least {self._policy.min_servers} needed."
        lost += "".join(f" Lost before: {m.url} ({m.reason})." for m in before)
        lost += " Go on from the newest checkpoint with `--ckpt_path last`."
        self._lost(ServersLostError(lost + tail_note(member)))


class SilentError(ServerError):
    """A server was asked whether it is there, and did not answer."""


def tail_note(member: Member) -> str:
    """The end of a server's log as a paragraph of a message; empty where there is none."""
    tail = member.handle.log_tail()
    return f"\nThe end of the log of {member.url}:\n{tail}" if tail else ""


def process_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


ABORT_INTERVAL_S = 0.05
"""A request that was on its way when the abort was sent is caught by the next one."""


def choose_interruption(
    wanted: InterruptionChoice, members: Sequence[Member], routes: bool = False
) -> Interruption:
    """The mode to use with these servers; `auto` is retract where all do it exactly, else abort.

    Retract spares each request in flight two more messages per update.

    Args:
        wanted: By the user.
        members: The servers.
        routes: Whether tokens must keep the experts that they were sampled with. SGLang forgets
            those of a retracted request, and tells those of the reading under the new weights.

    Raises:
        ConfigError: The mode would give tokens a wrong version or wrong keys and values: a server
            does not name the weights of each token, or keeps old prefixes.
    """
    if routes and wanted == "retract":
        raise ConfigError(
            "interruption",
            "must not be retract with `router_replay`: servers forget which experts the tokens of"
            " retracted requests were sampled with",
            wanted,
            "Use abort, or leave it out.",
        )
    if wanted == "auto":
        if routes:
            return "abort"
        return "retract" if all(_retracts_exactly(m) for m in members) else "abort"
    _check(wanted, members)
    return wanted


def _retracts_exactly(member: Member) -> bool:
    facts = member.facts
    return facts.dialect.reports_spans and facts.info.disable_radix_cache is not False


def _check(mode: Interruption, members: Sequence[Member]) -> None:
    if mode == "abort":
        return
    for member in members:
        if not member.facts.dialect.reports_spans:
            raise ConfigError(
                f"`interruption` must be abort for {member.url}: SGLang"
                f" {member.facts.info.version} does not say which weights sampled which token."
                " Use at least 0.5.19, or abort."
            )
        if mode == "retract" and member.facts.info.disable_radix_cache is False:
            raise ConfigError(
                f"`interruption` can't be retract for {member.url}: its prefix cache would give"
                " retracted requests the old weights' keys and values. Start it with"
                " `flags: {disable-radix-cache: true}`, or use abort."
            )
    if mode == "in_place":
        logger.warning(
            "interruption in_place: logprobs behind an update come from new weights over the old"
            " ones' keys and values; they are those of no version"
        )


def check_joins(member: Member, mode: Interruption, precisions: Collection[str]) -> None:
    """Refuses a server that came later than the run began, where the run was not made for it.

    Args:
        member: The server.
        mode: What becomes of requests in flight.
        precisions: What the servers of the beginning compute in: rounding was measured for those.

    Raises:
        ConfigError: What it does otherwise than they do.
    """
    if mode == "retract":
        _check(mode, [member])
    if member.precision not in precisions:
        raise ConfigError(
            f"{member.url} computes in {member.precision}, the servers at the start in"
            f" {' and '.join(sorted(precisions))}, which its proof is made for. Start it as they"
            " were, or begin the run with one of each kind."
        )


def check_memory_release(members: Sequence[Member]) -> None:
    """Refuses servers that can't give their GPU memory back.

    Raises:
        ConfigError: A server was not started for it.
    """
    for member in members:
        if not member.facts.info.enable_memory_saver:
            raise ConfigError(
                f"`release_memory` needs servers that can give their memory back, {member.url} was"
                " not started for it. Start it with `flags: {enable-memory-saver: true}`, or leave"
                " `release_memory` out."
            )


async def stop_generation(
    member: Member,
    timeout_s: float,
    suspect: Callable[[Member, Exception], None],
    mode: Interruption = "abort",
) -> None:
    """Pauses the server; to abort, aborts before until every reply has arrived.

    The replies carry the partial tokens, and may still be read while the server goes on to its
    update. SGLang's own pause by abort is not used: it polls every second for requests to be gone,
    also for one whose reply was just read. A server that does not play along is dirty.

    Args:
        member: The server; nothing new is sent to it meanwhile.
        timeout_s: How long it may take.
        suspect: Told of a server that failed.
        mode: What becomes of its requests.
    """
    try:
        with anyio.fail_after(timeout_s):
            if mode == "abort" and member.unanswered:
                await _drain(member)
            await member.pause("in_place" if mode == "in_place" else "retract")
    except (ServerError, TimeoutError) as error:
        reason = str(error) or f"it kept requests for {timeout_s:g} s after their abort"
        member.mark_dirty(reason)
        suspect(member, ServerError(reason))


async def _drain(member: Member) -> None:
    while member.unanswered:
        drained = member.drained  # the last answer may come before that to the abort
        await member.client.abort()
        with anyio.move_on_after(ABORT_INTERVAL_S):
            await drained.wait()
