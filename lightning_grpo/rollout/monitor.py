"""Notices servers that died or went silent, and has them replaced."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
import psutil

from lightning_grpo.errors import GRPOError, ServersLostError
from lightning_grpo.rollout.member import Member, MemberState, ServerLike

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """How soon a server counts as lost, and what then.

    Attributes:
        interval_s: Between two looks at every server.
        check_timeout_s: Longest health check.
        failed_checks: Checks failed in a row that make a server dead whose process lives.
        max_restarts: Of each server; one more death loses it.
        min_servers: The run ends when fewer are left.
        unavailable_timeout_s: Longest time that requests wait with no server to go to.
    """

    interval_s: float = 1.0
    check_timeout_s: float = 10.0
    failed_checks: int = 3
    max_restarts: int = 1
    min_servers: int = 1
    unavailable_timeout_s: float = 300.0


Restart = Callable[[str], Awaitable[ServerLike]]
Restore = Callable[[Member], Awaitable[None]]


class Monitor:
    """Watches members in the background; runs as one task of the pool.

    Args:
        members: The pool's servers.
        policy: The limits.
        restart: Starts the server of a URL again; None where the run did not start it.
        revive: Connects a restarted server and brings it to the current weights.
        changed: Called when a server became routable, or is lost for good.
        lost: Called once with the error that ends the run.
    """

    def __init__(
        self,
        members: Sequence[Member],
        policy: HealthPolicy,
        restart: Restart | None,
        *,
        revive: Callable[[Member, ServerLike], Awaitable[None]],
        changed: Callable[[], None],
        lost: Callable[[Exception], None],
    ) -> None:
        self._members = members
        self._policy = policy
        self._restart = restart
        self._revive = revive
        self._changed = changed
        self._lost = lost
        self._wake = anyio.Event()
        self._restarting: set[int] = set()
        self._given_up: set[int] = set()
        self._unavailable_since: float | None = None

    def may_return(self, member: Member) -> bool:
        """Whether a server that is not clean may become so without another update."""
        if member.slot in self._restarting or member.state is MemberState.UPDATING:
            return True
        return not member.alive and member.slot not in self._given_up

    @property
    def can_restart(self) -> bool:
        """Whether the run started the servers itself."""
        return self._restart is not None

    def wake(self) -> None:
        """Looks at every server now."""
        self._wake.set()

    def suspect(self, member: Member, error: Exception) -> None:
        """A request failed on it: look now, and route nothing to it until it answers."""
        logger.warning("server %d at fault: %s", member.slot, error)
        member.suspect = True
        self._wake.set()

    async def run(self) -> None:
        """Looks at every server until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                async with anyio.create_task_group() as checks:
                    for member in self._members:
                        if member.alive:
                            checks.start_soon(self._check, member)
                for member in self._members:
                    if not member.alive and member.slot not in self._restarting | self._given_up:
                        self._handle_death(member, tasks)
                self._check_availability()
                with anyio.move_on_after(self._policy.interval_s):
                    await self._wake.wait()
                self._wake = anyio.Event()

    async def _check(self, member: Member) -> None:
        pid = member.handle.pid
        if pid is not None and not process_alive(pid):
            member.mark_dead(f"its process {pid} is gone")
            return
        if member.state is MemberState.UPDATING:
            return  # The update has deadlines of its own.
        # SGLang's health check wants a token, which a paused server doesn't give.
        paused = member.paused
        answers = member.client.listens if paused else member.client.healthy
        if await answers(self._policy.check_timeout_s):
            member.num_failed_checks = 0
            if member.suspect:
                member.suspect = False
                self._changed()
            return
        if member.paused and not paused:
            return  # The pause held the check back: that says nothing.
        member.suspect = True
        member.num_failed_checks += 1
        if member.num_failed_checks >= self._policy.failed_checks:
            member.mark_dead(f"it failed {member.num_failed_checks} health checks in a row")

    def _handle_death(self, member: Member, tasks: anyio.abc.TaskGroup) -> None:
        """Restarts a dead server, or gives it up."""
        member.num_deaths += 1
        if self._restart is not None and member.num_deaths <= self._policy.max_restarts:
            logger.warning("server %d died and is restarted: %s", member.slot, member.describe())
            self._restarting.add(member.slot)
            tasks.start_soon(self._replace, member)
            return
        self._given_up.add(member.slot)
        left = len(self._members) - len(self._given_up)
        if left < self._policy.min_servers:
            self._lost(ServersLostError(self._obituary(member, left)))
        else:
            logger.error("server %d is lost: %s", member.slot, member.describe())
            self._changed()

    async def _replace(self, member: Member) -> None:
        assert self._restart is not None
        try:
            handle = await self._restart(member.url)
            await self._revive(member, handle)
        except (GRPOError, TimeoutError, OSError) as error:
            member.mark_dead(f"{member.reason}; its restart failed: {error}")
            member.num_deaths = max(member.num_deaths, self._policy.max_restarts)
        self._restarting.discard(member.slot)
        self._wake.set()

    def _check_availability(self) -> None:
        if any(m.state in (MemberState.CLEAN, MemberState.UPDATING) for m in self._members):
            self._unavailable_since = None
            return
        now = anyio.current_time()
        if self._unavailable_since is None:
            self._unavailable_since = now
        if now - self._unavailable_since > self._policy.unavailable_timeout_s:
            self._lost(
                ServersLostError(
                    f"No server could be used for {self._policy.unavailable_timeout_s:g} s: "
                    + "; ".join(m.describe() for m in self._members)
                    + "".join(tail_note(m) for m in self._members)
                )
            )

    def _obituary(self, member: Member, left: int) -> str:
        times = "again" if member.num_deaths > 1 else "and is not restarted"
        return (
            f"Server {member.url} died {times} ({member.reason}); {left} of {len(self._members)}"
            f" servers are left, at least {self._policy.min_servers} needed.{tail_note(member)}"
        )


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
