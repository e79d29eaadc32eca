"""How token losses become one number: a weight for each token, with global denominators.

The sum of `weights * loss` over all tokens, micro-batches and ranks of a minibatch is its loss, so
a split into micro-batches changes nothing. Under a strategy that averages gradients over ranks the
caller multiplies by the number of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_grpo.algorithm.batch import MicroBatch
from lightning_grpo.algorithm.layout import expand, sequence_sum
from lightning_grpo.checks import require_number


class Aggregation(ABC):
    """Weights the tokens of a micro-batch."""

    @abstractmethod
    def weights(self, batch: MicroBatch) -> Tensor:
        """`[tokens]`; 0 outside `loss_mask`."""


@dataclass(frozen=True)
class TokenMean(Aggregation):
    """Mean over all tokens of the global minibatch. Source: DAPO, arXiv 2503.14476, equation 8."""

    def weights(self, batch: MicroBatch) -> Tensor:
        """`[tokens]`; 0 outside `loss_mask`."""
        mask = batch.loss_mask.to(batch.behavior_logprobs.dtype)
        return mask / max(batch.denominators.tokens, 1)


@dataclass(frozen=True)
class SequenceMean(Aggregation):
    """Mean over the tokens of each sequence, then over sequences.

    Source: GRPO, arXiv 2402.03300, equation 3.
    """

    def weights(self, batch: MicroBatch) -> Tensor:
        """`[tokens]`; 0 outside `loss_mask`."""
        mask = batch.loss_mask.to(batch.behavior_logprobs.dtype)
        lengths = sequence_sum(mask, batch.cu_seqlens).clamp_min(1.0)
        return mask / expand(lengths, batch.cu_seqlens) / max(batch.denominators.sequences, 1)


@dataclass(frozen=True)
class ConstantLength(Aggregation):
    """Sum over the tokens of each sequence divided by a constant, then mean over sequences.

    Source: Dr.GRPO, arXiv 2503.20783, section 3.2.

    Args:
        tokens: The constant, most often `max_new_tokens`.
    """

    tokens: int

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number(
            "tokens",
            self.tokens,
            least=1,
            whole=True,
            why="losses are divided by it",
            way_out="Way out: use the workflow's `max_new_tokens`.",
        )

    def weights(self, batch: MicroBatch) -> Tensor:
        """`[tokens]`; 0 outside `loss_mask`."""
        mask = batch.loss_mask.to(batch.behavior_logprobs.dtype)
        return mask / (max(batch.denominators.sequences, 1) * self.tokens)
