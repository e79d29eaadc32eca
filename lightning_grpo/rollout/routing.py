"""Which request goes to which server, and when.

Evaluation goes first, then requests that were interrupted (they hold the oldest tokens), then
fresh ones; within a class first come, first served. A request goes to the server that its group
used before (the prompt's prefix is cached there) unless that one is much busier than the least
loaded.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from enum import IntEnum

from lightning_grpo.rollout.member import Member

AFFINITY_SLACK = 8
"""How many more requests than the least loaded a group's own server may hold."""
REMEMBERED_GROUPS = 8192


class Rank(IntEnum):
    """Order of service."""

    PRIORITY = 0
    CONTINUED = 1
    FRESH = 2


Waiter = tuple[int, int, Hashable, "asyncio.Future[Member]"]


class Router:
    """Hands servers to waiting requests; nothing here blocks, all of it runs on one loop.

    Args:
        members: The pool's servers; their states change under the router, which is told by
            `dispatch`.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._waiters: list[Waiter] = []
        self._ticket = itertools.count()
        self._homes: OrderedDict[Hashable, int] = OrderedDict()
        self._error: Exception | None = None
        self.closed = False

    @property
    def num_waiting(self) -> int:
        """Requests that no server has taken yet."""
        return sum(not future.done() for *_, future in self._waiters)

    async def acquire(self, group_key: Hashable, rank: Rank) -> Member:
        """Waits for a server with room; unblocked by `dispatch`, `release` and `fail`."""
        if self._error is not None:
            raise self._error
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (rank, next(self._ticket), group_key, future))
        self.dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())
            raise

    def release(self, member: Member) -> None:
        """The request has ended, well or not; its place is free."""
        member.give_back()
        self.dispatch()

    def close(self) -> None:
        """Hands nothing out until `open`."""
        self.closed = True

    def open(self) -> None:
        """Hands servers out again."""
        self.closed = False
        self.dispatch()

    def fail(self, error: Exception) -> None:
        """Every request that waits or will come raises `error`."""
        self._error = error
        waiters, self._waiters = self._waiters, []
        for *_, future in waiters:
            if not future.done():
                future.set_exception(error)

    def dispatch(self) -> None:
        """Gives waiting requests to servers with room, in order."""
        while self._waiters and not self.closed:
            *_, group_key, future = self._waiters[0]
            if not future.done():
                member = self._choose(group_key)
                if member is None:
                    return
                member.take()
                future.set_result(member)
            heapq.heappop(self._waiters)

    def _choose(self, group_key: Hashable) -> Member | None:
        free = [m for m in self._members if m.routable and m.in_flight < m.bound]
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
