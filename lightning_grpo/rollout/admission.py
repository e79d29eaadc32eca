"""What is let in: the order in which prompts are drawn, and the gate of the staleness rule.

Prompts come in seeded passes, by curricula and mixtures.

The gate says who may start and what may be trained on: the whole of the staleness rule, without any
I/O.

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

import hashlib
import itertools
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_grpo.errors import (
    MOST,
    CheckpointError,
    ConfigError,
    RolloutError,
    require_count,
    require_number,
)
from lightning_grpo.rollout.prompts import PromptSet
from lightning_grpo.types import Group, Prompt, PromptKey

# -- which prompt goes next ------------------------------------------------------------------------


class PromptStream:
    """One endless stream: seeded passes over the prompts, joined end to end.

    Entry i is position `i % N` of pass `i // N`; each pass is a permutation given by (seed, pass)
    alone, so any entry can be had at any time and the state is two numbers.

    Args:
        prompts: Its rows, and the settings of their order.

    Attributes:
        cursor: Entries that are behind, skipped ones included.
        asked: Those of them that were asked.
    """

    def __init__(self, prompts: PromptSet) -> None:
        self.prompts = prompts
        self.shuffle, self.seed = prompts.prompts.shuffle, prompts.prompts.seed
        self.weight = prompts.prompts.weight
        self.num_rows = len(prompts)
        self.cursor = self.asked = 0
        self._orders: dict[int, Sequence[int]] = {}

    def key(self, index: int) -> PromptKey:
        """The name of entry `index`, without making the prompt."""
        pass_index, position = divmod(index, self.num_rows)
        return pass_index, self._order(pass_index)[position]

    def _order(self, pass_index: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.num_rows)
        if pass_index not in self._orders:
            order = list(range(self.num_rows))
            random.Random(f"{self.seed}:{pass_index}").shuffle(order)
            # Two passes meet at a seam; older ones are only asked for after a resume.
            self._orders = {k: v for k, v in self._orders.items() if k == pass_index - 1}
            self._orders[pass_index] = order
        return self._orders[pass_index]


def unsolved(success: float) -> float:
    """1 - success: what was solved is asked less. Source: Kimi k1.5, arXiv 2501.12599."""
    return 1.0 - success


def undecided(success: float) -> float:
    """4 success (1 - success): most for prompts that are solved half of the time.

    Source: the learnability of arXiv 2502.12272, scaled to 1.
    """
    return 4.0 * success * (1.0 - success)


@dataclass(frozen=True)
class Curriculum:
    """Leaves prompts out of a pass by how often they were solved the last time they were asked.

    A prompt is asked with the probability that `priority` gives to its success, at least `least`;
    one that was never asked is always asked. The draws follow from the seed, the pass and the row.

    Args:
        priority: From the share of a group's completions that were right to a probability:
            `unsolved`, `undecided`, or a function of yours.
        least: Smallest probability, so that no prompt is forgotten.
        passing_reward: Reward from which a completion counts as right.
    """

    priority: Callable[[float], float] = unsolved
    least: float = 0.1
    passing_reward: float = 0.5

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number("curriculum.passing_reward", self.passing_reward, least=-MOST)
        if not 0 < self.least <= 1:
            raise ConfigError(
                "`curriculum.least` must be > 0 and <= 1 (a prompt's smallest probability to be "
                f"asked), got {self.least}. Way out: 0.1."
            )

    def success(self, group: Group) -> float:
        """The share of a group's completions that were right."""
        right = [t.reward >= self.passing_reward for t in group.trajectories]
        return sum(right) / len(right)

    def asks(self, key: PromptKey, success: float | None, seed: int = 0) -> bool:
        """Whether a prompt is asked in this pass.

        Args:
            key: The prompt.
            success: Of the last time it was asked; None: it was not.
            seed: Of the run.
        """
        if success is None:
            return True
        digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
        draw = int.from_bytes(digest, "big") / 2**64
        return draw < max(self.least, self.priority(success))


class PromptMixture:
    """The endless stream of a run: entries of one or several datasets in turn.

    The next prompt is of the dataset that is furthest behind its share, so any stretch of the
    stream has the datasets in proportion, and the state is a few numbers. Each dataset has passes
    of its own. In keys, the rows of all datasets are counted end to end.

    Consumes the datasets' rows; never waits. Produces the next key (`peek`) and its prompt
    (`by_key`). The producer goes on, which admits it.

    Args:
        sets: The datasets by name; one alone has the empty name.
        curriculum: Leaves prompts out of a pass by their past success.
        seed: Of the curriculum's draws.

    Attributes:
        sets: The same.
        sizes: Their rows.
    """

    def __init__(
        self, sets: Mapping[str, PromptSet], curriculum: Curriculum | None = None, seed: int = 0
    ) -> None:
        self._curriculum = curriculum
        self._seed = seed
        self.sets = dict(sets)
        self.sizes = [len(each) for each in sets.values()]
        self._streams = [PromptStream(each) for each in sets.values()]
        self._starts = [0, *itertools.accumulate(self.sizes)]

    @property
    def num_rows(self) -> int:
        """Rows of all datasets."""
        return self._starts[-1]

    @property
    def pass_index(self) -> int:
        """The pass of the dataset that has had the fewest."""
        return min(stream.cursor // stream.num_rows for stream in self._streams)

    def peek(self) -> PromptKey:
        """The name of the next entry."""
        at = self._next_stream()
        pass_index, row = self._streams[at].key(self._streams[at].cursor)
        return pass_index, self._starts[at] + row

    def advance(self, *, asked: bool = True) -> None:
        """Go behind the next entry.

        Args:
            asked: Whether it counts towards its dataset's share.
        """
        stream = self._streams[self._next_stream()]
        stream.cursor += 1
        stream.asked += asked

    def wants(self, key: PromptKey, success: float | None) -> bool:
        """Whether an entry is to be asked.

        Args:
            key: Its name.
            success: Of the last time that its row was asked; None: it was not.
        """
        return self._curriculum is None or self._curriculum.asks(key, success, self._seed)

    def success(self, group: Group) -> float | None:
        """What is to be remembered of a group; None: nothing."""
        return None if self._curriculum is None else self._curriculum.success(group)

    def by_key(self, key: PromptKey) -> Prompt:
        """Make the prompt that a key names."""
        pass_index, row = key
        if not 0 <= row < self.num_rows:
            raise CheckpointError(
                f"prompt {key} is not one of the {self.num_rows} rows: the prompts are not those "
                "that the checkpoint was made with."
            )
        at = bisect_right(self._starts, row) - 1
        prompt = self._streams[at].prompts.prompt(row - self._starts[at], pass_index)
        return replace(prompt, row=row)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        streams = zip(self.sets, self._streams, strict=True)
        return {name: [stream.cursor, stream.asked] for name, stream in streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: It is of other datasets.
        """
        if list(state) != list(self.sets):
            raise CheckpointError(
                f"the checkpoint was made with the datasets {list(state)}, this run has "
                f"{list(self.sets)}. Resume with the prompts that the run was started with."
            )
        for name, stream in zip(self.sets, self._streams, strict=True):
            stream.cursor, stream.asked = (int(number) for number in state[name])

    def _next_stream(self) -> int:
        behind = [(stream.asked + 1) / stream.weight for stream in self._streams]
        return behind.index(min(behind))


# -- how many may go, and what may be trained on ---------------------------------------------------

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
