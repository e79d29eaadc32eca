"""What a data module asks of its rollouts, live or recorded."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from lightning_grpo.distributed import RankChannel
from lightning_grpo.loader import RolloutSource
from lightning_grpo.types import RolloutProgress
from lightning_grpo.validation import EvaluationBatch
from lightning_grpo.weights.publisher import PublishReport, SyncSettings


class Session(RolloutSource, Protocol):
    """One run's rollouts as every rank sees them.

    Attributes:
        channel: To the other ranks.
        version: Weight version of the trainer: rollout batches trained on so far.
        num_prompts: Prompts of one pass.
        num_val_prompts: Held-out prompts by set.
        pinned: What a checkpoint's positions depend on: it must not change on the way.
        remaining_batches: Rollout batches that the trainer will still take; None: no limit known.
        sync: How weights travel.
    """

    channel: RankChannel
    version: int
    num_prompts: int
    num_val_prompts: dict[str, int]
    pinned: dict[str, Any]
    remaining_batches: int | None
    sync: SyncSettings

    def start(self) -> None:
        """Begin what takes long, in the background."""
        ...

    def close(self) -> None:
        """End everything; from any state, any number of times."""
        ...

    def publish(self, policy: nn.Module, *, trained: bool) -> PublishReport | None:
        """The trainer has (new) weights."""
        ...

    def release_memory(self) -> None:
        """The servers give their GPU memory back until the next publish."""
        ...

    def ask(self, name: str, first: int, last: int) -> None:
        """Start to answer held-out prompts `first` to `last` (exclusive)."""
        ...

    def answer(self, name: str, first: int, last: int) -> EvaluationBatch:
        """Wait for prompts that were asked; the scores reach every rank."""
        ...

    def state_dict(self, num_unpublished: int = 0) -> dict[str, Any]:
        """Everything to go on from, as plain data; some weights may not be published yet."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        ...

    def progress(self) -> RolloutProgress | None:
        """How far the next rollout batch is, if that is known here; from any thread."""
        ...

    def health(self) -> dict[str, float]:
        """`health/...` of rank 0; empty elsewhere."""
        ...

    def dtypes(self) -> dict[str, str]:
        """Of the weights on the wire and in the servers, where there are any; rank 0 only."""
        ...

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start."""
        ...
