"""Which request goes to which server, and when.

Evaluation goes first, then requests that were interrupted (they hold the oldest tokens), then fresh
ones; within a class first come, first served. A request goes to the server that its group used
before (the prompt's prefix is cached there) unless that one is much busier than the least loaded.
What may leave at once, after an update or at the start, leaves in slices: ten thousand requests
would hold the event loop for seconds.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from enum import IntEnum

from lightning_grpo.serving.server import Member

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
