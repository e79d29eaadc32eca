"""Corrections for samples that another policy drew: weights or masks on tokens and sequences.

All compare the trainer's policy before the step (proximal) with the one that sampled (behavior):
rho = proximal / behavior. They return detached weights `[tokens]` that multiply the token losses;
denominators stay as they are, so a dropped token counts as a loss of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.algorithm.batch import (
    MAX_LOG_RATIO,
    MicroBatch,
    expand,
    log_ratio,
    sequence_mean,
    sequence_sum,
)
from lightning_grpo.algorithm.metrics import Metrics, masked_mean
from lightning_grpo.errors import require_band, require_cap, require_number


class Correction(ABC):
    """Weights the token losses of samples from another policy."""

    @abstractmethod
    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""


def token_log_ratio(proximal_logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """Clamped log rho; 0 outside `loss_mask`, `[tokens]`."""
    return log_ratio(proximal_logprobs.detach(), batch.behavior_logprobs, batch.loss_mask)


def sequence_product_log_ratio(proximal_logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """Sum of log rho over the sequence, clamped, at each of its tokens: `[tokens]`."""
    total = sequence_sum(token_log_ratio(proximal_logprobs, batch), batch.cu_seqlens)
    return expand(total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), batch.cu_seqlens)


def sequence_mean_log_ratio(proximal_logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """Mean of log rho over the sequence's loss tokens, at each of its tokens: `[tokens]`."""
    ratios = token_log_ratio(proximal_logprobs, batch)
    return expand(sequence_mean(ratios, batch.loss_mask, batch.cu_seqlens), batch.cu_seqlens)


def in_band(ratio: Tensor, low: float, high: float) -> Tensor:
    """Whether low <= ratio <= high, bool."""
    return (ratio >= low) & (ratio <= high)


def _capped(ratio: Tensor, cap: float, batch: MicroBatch) -> tuple[Tensor, Metrics]:
    weights, metrics = _logged(ratio.clamp_max(cap), batch)
    metrics["correction/capped_fraction"] = masked_mean((ratio > cap).float(), batch.loss_mask)
    return weights, metrics


def _logged(weights: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return weights, {
        "correction/weight_mean": masked_mean(weights, batch.loss_mask),
        "correction/dropped_fraction": masked_mean((weights == 0).float(), batch.loss_mask),
    }


@dataclass(frozen=True)
class TokenTIS(Correction):
    """Truncated importance sampling per token: min(rho, cap).

    Source: Espeholt et al., arXiv 1802.01561, section 4.1, as used in decoupled PPO, arXiv
    2505.24298, equation 5.

    Args:
        cap: The largest weight.
    """

    cap: float = 2.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_cap(self.cap)

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        return _capped(token_log_ratio(proximal_logprobs, batch).exp(), self.cap, batch)


@dataclass(frozen=True)
class SequenceTIS(Correction):
    """Truncated importance sampling per sequence: min(product of rho, cap).

    Args:
        cap: The largest weight.
    """

    cap: float = 5.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_cap(self.cap)

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        return _capped(sequence_product_log_ratio(proximal_logprobs, batch).exp(), self.cap, batch)


@dataclass(frozen=True)
class IcePop(Correction):
    """rho inside the band, 0 outside. Source: arXiv 2510.18855, equation 3.

    Watch `correction/dropped_fraction`: a mask that drops ever more tokens ends the learning.

    Args:
        low: Smallest ratio that is kept.
        high: Largest ratio that is kept.
    """

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_band(self.low, self.high)

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        ratio = token_log_ratio(proximal_logprobs, batch).exp()
        return _logged(ratio * in_band(ratio, self.low, self.high), batch)


@dataclass(frozen=True)
class TokenMask(Correction):
    """1 for tokens with rho inside the band, 0 outside.

    Args:
        low: Smallest ratio that is kept.
        high: Largest ratio that is kept.
    """

    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_band(self.low, self.high)

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        ratio = token_log_ratio(proximal_logprobs, batch).exp()
        return _logged(in_band(ratio, self.low, self.high).to(ratio.dtype), batch)


@dataclass(frozen=True)
class SequenceMask(Correction):
    """1 for sequences whose product of rho is inside the band, 0 outside.

    Args:
        low: Smallest product that is kept.
        high: Largest product that is kept.
    """

    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_band(self.low, self.high)

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        ratio = sequence_product_log_ratio(proximal_logprobs, batch).exp()
        return _logged(in_band(ratio, self.low, self.high).to(ratio.dtype), batch)


@dataclass(frozen=True)
class GeometricMask(Correction):
    """1 for sequences whose geometric mean of rho is inside the band, 0 outside.

    Unlike the product it doesn't grow with the length, so it suits long answers.

    Args:
        low: Smallest mean that is kept.
        high: Largest mean that is kept.
    """

    low: float = 0.99
    high: float = 1.01

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_band(self.low, self.high)

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        ratio = sequence_mean_log_ratio(proximal_logprobs, batch).exp()
        return _logged(in_band(ratio, self.low, self.high).to(ratio.dtype), batch)


@dataclass(frozen=True)
class OPSM(Correction):
    """Off-policy sequence mask: drops bad sequences that the policy has moved away from.

    0 where A < 0 and the sequence's mean of log(behavior / policy) exceeds delta, else 1. Uses
    the policy being trained where the batch carries it, else the proximal one.
    Source: DeepSeek-V3.2, arXiv 2512.02556, equation 9.

    Args:
        delta: Largest mean log-ratio of negative sequences.
    """

    delta: float = 0.5

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number(
            "delta",
            self.delta,
            least=0,
            why="0 is the value of equal policies",
            way_out="Way out: 0.5.",
        )

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        current = batch.policy_logprobs
        current = proximal_logprobs if current is None else current
        divergence = -sequence_mean_log_ratio(current, batch)
        drop = (batch.advantages < 0) & (divergence > self.delta)
        return _logged((~drop).to(divergence.dtype), batch)


@dataclass(frozen=True)
class CombinedCorrection(Correction):
    """The product of several corrections, such as GeometricMask and TokenTIS.

    Args:
        corrections: What to multiply.
    """

    corrections: Sequence[Correction]

    def __call__(self, proximal_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Detached weights `[tokens]`, and metrics by name."""
        weights = torch.ones_like(batch.behavior_logprobs)
        for correction in self.corrections:
            weights = weights * correction(proximal_logprobs, batch)[0]
        return _logged(weights, batch)
