"""The order in which prompts are drawn: seeded passes, curricula and mixtures."""

from __future__ import annotations

import hashlib
import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_grpo.errors import MOST, CheckpointError, ConfigError, require_number
from lightning_grpo.rollout.prompts import PromptSet
from lightning_grpo.types import Group, Prompt, PromptKey


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
