"""Who may start and what may be trained on: the whole of the staleness rule, without any I/O.

Words: `batch_size` is B, `max_staleness` is S, `version` counts published weights. A *slot* is held
by a group from its admission until the weights trained on it are published; a group *must be taken*
by the batch of version `admitted version + S`, its last admissible one.

Two rules keep every taken group within S, whatever the order in which groups finish:

1. At most `(S + 1) * B` slots are held (running, finished, taken but not yet published).
2. A batch leaves behind, for every version d, no more groups that must be taken by d than the
   batches up to d have room for: `(d - this batch's version) * B`. Taking the oldest finished
   groups first serves this best; where it isn't enough the batch waits for older ones to finish.

Rule 1 makes rule 2 satisfiable: before the batch of version t at most `(S + 1) * B - pending * B`
groups wait, each admitted at `t - pending` or earlier, so there is room for all of them in the
batches up to the last one's last version; a batch that obeys rule 2 leaves that true for the next.
A filtered or failed group gives its slot back at once; its replacement, like a group that is tried
again, counts as admitted at the current version, which only moves its last version further away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

from lightning_grpo.errors import RolloutError, require_count

Policy = Literal["wait", "drop", "strict"]


class StalenessGate:
    """Admits groups and selects batches so that no group is older than `max_staleness` versions.

    Consumes what happens to groups (`admit`, `finish`, `retry`, `release`) and new versions
    (`advance`). Never waits: the producer asks it whenever something changed. Produces leave to
    start (`may_admit`) and the tickets of a batch (`take`).

    Args:
        batch_size: Groups of one rollout batch.
        max_staleness: Versions that a batch's oldest token may be behind; 0 is exactly on-policy.
        max_groups: Groups that the trainer takes over the whole run; None is unlimited.
        policy: `wait` for groups at their last admissible version, `drop` them when it has passed,
            or `strict`: the groups that were admitted first, once all groups have finished. Slower,
            and the same whoever finishes first.
    """

    def __init__(
        self,
        batch_size: int,
        max_staleness: int,
        max_groups: int | None = None,
        policy: Policy = "wait",
    ) -> None:
        require_count("batch_size", batch_size)
        require_count("max_staleness", max_staleness, least=0)
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.policy: Policy = policy
        self.max_groups = max_groups
        self.version = 0
        self.num_taken = 0
        self._next_ticket = 0
        self._admitted: dict[int, int] = {}  # ticket -> version; every group not yet taken
        self._finished: set[int] = set()
        self._pending: deque[int] = deque()  # sizes of batches taken, their weights not published

    @property
    def num_running(self) -> int:
        """Groups admitted that have not finished."""
        return len(self._admitted) - len(self._finished)

    @property
    def num_finished(self) -> int:
        """Groups that wait to be taken."""
        return len(self._finished)

    @property
    def num_outstanding(self) -> int:
        """Slots held."""
        return len(self._admitted) + sum(self._pending)

    @property
    def num_pending_batches(self) -> int:
        """Batches taken whose weights are not published."""
        return len(self._pending)

    @property
    def batch_version(self) -> int:
        """The version that the next batch to be taken will be trained at."""
        return self.version + len(self._pending)

    def admitted_version(self, ticket: int) -> int:
        """The version at which a group not yet taken was let in."""
        return self._admitted[ticket]

    @property
    def is_settled(self) -> bool:
        """Whether everyone has finished and nobody more may start: who did is then no chance."""
        return self.num_running == 0 and not self.may_admit()

    def may_admit(self) -> bool:
        """Whether one more group may start now."""
        if self.max_groups is not None and self.num_taken + len(self._admitted) >= self.max_groups:
            return False
        return self.num_outstanding < (self.max_staleness + 1) * self.batch_size

    def reserve(self) -> int:
        """The next ticket, for a group that is let in later and keeps its place all the same."""
        self._next_ticket += 1
        return self._next_ticket - 1

    def admit(self, ticket: int | None = None) -> int:
        """Let one group in; its ticket (a reserved one or the next) names it from here on."""
        if not self.may_admit():
            raise RolloutError("admit() without a free slot: ask may_admit() first.")
        ticket = self.reserve() if ticket is None else ticket
        self._admitted[ticket] = self.version
        return ticket

    def retry(self, ticket: int) -> int:
        """Start a group over, all its tokens thrown away; returns the version it now has."""
        self._admitted[ticket] = self.version
        self._finished.discard(ticket)
        return self.version

    def finish(self, ticket: int) -> None:
        """A group is complete and waits to be taken."""
        if ticket not in self._admitted:
            raise RolloutError(f"group {ticket} finished but is not running.")
        self._finished.add(ticket)

    def release(self, ticket: int) -> None:
        """A group was filtered, failed or dropped: its slot is free at once."""
        del self._admitted[ticket]
        self._finished.discard(ticket)

    def select(self) -> list[int] | None:
        """The tickets of the next batch, oldest first, or None while it must wait."""
        if self.policy == "strict":
            first = sorted(self._admitted)[: self.batch_size]
            return first if self.is_settled and len(first) == self.batch_size else None
        chosen = self._by_age(self._finished)[: self.batch_size]
        if len(chosen) < self.batch_size:
            return None
        return chosen if self.policy == "drop" or not self.blockers() else None

    def blockers(self) -> list[int]:
        """Running groups that the next batch can't do without, however many others are ready."""
        chosen = set(self._by_age(self._finished)[: self.batch_size])
        blockers: list[int] = []
        for last in sorted({v + self.max_staleness for v in self._admitted.values()}):
            due = {t for t, v in self._admitted.items() if v + self.max_staleness <= last}
            room_later = (last - self.batch_version) * self.batch_size
            missing = len(due) - room_later - len(chosen & due) - len(blockers)
            if missing > 0:
                running = self._by_age(due - self._finished - set(blockers))
                blockers += running[:missing]
        return blockers

    def take(self) -> list[int] | None:
        """Remove the selected groups, if there is a batch; their slots are held until `advance`."""
        tickets = self.select()
        if tickets is None:
            return None
        for ticket in tickets:
            self.release(ticket)
        self._pending.append(len(tickets))
        self.num_taken += len(tickets)
        return tickets

    def awaited(self) -> list[int]:
        """Running groups that the next batch waits for; any of them ending may let it go on."""
        if self.policy == "strict":
            return self._by_age(self._admitted.keys() - self._finished)
        missing = self.batch_size - len(self._finished)
        if missing > 0:
            return self._by_age(self._admitted.keys() - self._finished)[:missing]
        return self.blockers() if self.policy == "wait" else []

    @property
    def is_exhausted(self) -> bool:
        """Whether `max_groups` leaves no room for one more batch."""
        return self.max_groups is not None and self.max_groups - self.num_taken < self.batch_size

    def advance(self, version: int) -> None:
        """New weights are on the servers: the batches they were trained on free their slots."""
        if version < self.version:
            raise RolloutError(f"weight version went back from {self.version} to {version}.")
        for _ in range(min(version - self.version, len(self._pending))):
            self._pending.popleft()
        self.version = version

    def overdue(self) -> list[int]:
        """Groups that no batch may take any more.

        Empty under `wait` and `strict` as long as each version publishes one batch.
        """
        oldest = self.batch_version - self.max_staleness
        return self._by_age(t for t, v in self._admitted.items() if v < oldest)

    def state_dict(self, num_trained: int = 0) -> dict[str, Any]:
        """Counters only: the groups themselves are admitted again, or restored, by the producer.

        A batch whose weights are not published counts as not taken: its groups are restored too.

        Args:
            num_trained: So many of these, oldest first, count as taken and published.
        """
        given_back = sum(list(self._pending)[num_trained:])
        return {
            "version": self.version + num_trained,
            "num_taken": self.num_taken - given_back,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; no group is outstanding then."""
        self.version = int(state["version"])
        self.num_taken = int(state["num_taken"])
        self._pending.clear()
        self._admitted.clear()
        self._finished.clear()

    def restore_finished(self, admitted_version: int) -> int:
        """Put back a finished group of a checkpoint, at the version that it was admitted at."""
        ticket = self.reserve()
        self._admitted[ticket] = admitted_version
        self._finished.add(ticket)
        return ticket

    def _by_age(self, tickets: Iterable[int]) -> list[int]:
        return sorted(tickets, key=lambda ticket: (self._admitted[ticket], ticket))
