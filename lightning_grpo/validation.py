"""Held-out prompts as a validation dataloader; the trainer waits, the servers don't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from lightning_grpo.types import Group


@dataclass(frozen=True)
class EvaluationBatch:
    """Some held-out prompts, answered.

    Attributes:
        name: The validation set; empty if there is only one.
        sampled: Rewards of the sampled completions, fp64 `[prompts, k]`, or None.
        greedy: Reward of the greedy completion, fp64 `[prompts]`, or None.
        groups: The trajectories (greedy last); rank 0 only, else empty.
    """

    name: str
    sampled: Tensor | None
    greedy: Tensor | None
    groups: list[Group]


Answer = Callable[[str, int, int], EvaluationBatch]
"""`(set name, first row, last row) -> batch`, called on all ranks at the same point."""


class EvaluationLoader:
    """One validation set in chunks, answered one chunk ahead of the trainer's reading.

    Args:
        name: Which set.
        num_prompts: How many prompts it has.
        chunk: Prompts of one batch.
        ask: Starts a chunk: `(name, first, last)`.
        answer: Waits for a chunk that was started.
    """

    def __init__(
        self,
        name: str,
        num_prompts: int,
        chunk: int,
        ask: Callable[[str, int, int], None],
        answer: Answer,
    ) -> None:
        self.name = name
        self._bounds = [(i, min(i + chunk, num_prompts)) for i in range(0, num_prompts, chunk)]
        self._ask = ask
        self._answer = answer
        self.limit = len(self._bounds)

    def __len__(self) -> int:
        """Batches of this set."""
        return len(self._bounds)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Ask for the next chunk before waiting for this one, so that the servers stay busy."""
        bounds = self._bounds[: self.limit]
        if bounds:
            self._ask(self.name, *bounds[0])
        for k, (first, last) in enumerate(bounds):
            if k + 1 < len(bounds):
                self._ask(self.name, *bounds[k + 1])
            yield self._answer(self.name, first, last)
