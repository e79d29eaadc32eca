"""Policy losses that bound the step without a clip: SAPO's gate, DPPO's and M2PO's masks.

As in `losses`, the ratio is that of the policy to `batch.proximal_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_grpo.algorithm.aggregation import Aggregation, SequenceMean, TokenMean
from lightning_grpo.algorithm.batch import MicroBatch
from lightning_grpo.algorithm.losses import PolicyLoss
from lightning_grpo.algorithm.metrics import Metrics, masked_mean
from lightning_grpo.algorithm.ratio import anchor, anchored_log_ratio, ratio_metrics
from lightning_grpo.checks import require_positive


def soft_gate(
    log_ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float
) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, `[tokens]`.

    Source: SAPO, arXiv 2511.20347, equations 5 and 6.
    """
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    return -(4.0 / tau) * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantages


def total_variation_keep(
    policy_logprobs: Tensor, anchor_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """False where the token's probability already moved too far the way the advantage pushes.

    Drops A > 0 with pi - mu > high, and A < 0 with pi - mu < -low; bool `[tokens]`.
    Source: DPPO (binary total variation), arXiv 2602.04879.
    """
    moved = policy_logprobs.detach().exp() - anchor_logprobs.exp()
    too_high = (advantages > 0) & (moved > high)
    too_low = (advantages < 0) & (moved < -low)
    return ~(too_high | too_low)


def second_moment_keep(log_ratio: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """False for the tokens of largest (log r)^2, as few as bring its mean to the threshold.

    Bool `[tokens]`; true outside `mask`. Source: M2PO, arXiv 2510.01161, section 4.
    """
    squares = log_ratio.detach()[mask].square()
    keep = torch.ones_like(mask)
    if squares.numel() == 0:
        return keep
    ascending, order = squares.sort(stable=True)
    counts = torch.arange(1, len(ascending) + 1, device=ascending.device)
    # The mean of the k smallest never falls as k grows, so this is a prefix.
    kept_sorted = ascending.cumsum(0) / counts <= threshold
    keep[mask] = torch.empty_like(kept_sorted).index_copy(0, order, kept_sorted)
    return keep


@dataclass(frozen=True)
class SAPOLoss(PolicyLoss):
    """A smooth gate in the place of the clip: the gradient fades as the ratio leaves 1.

    Args:
        tau_positive: Steepness for positive advantages.
        tau_negative: Steepness for the others; larger fades sooner.
        aggregation: How token losses become one number.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    aggregation: Aggregation = field(default_factory=SequenceMean)

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_positive("tau_positive", self.tau_positive, "1.0")
        require_positive("tau_negative", self.tau_negative, "1.05")

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""
        log_ratio = anchored_log_ratio(policy_logprobs, batch)
        loss = soft_gate(log_ratio, batch.advantages, self.tau_positive, self.tau_negative)
        return loss, ratio_metrics(log_ratio, batch)


@dataclass(frozen=True)
class DPPOLoss(PolicyLoss):
    """The plain ratio loss without the tokens whose probability moved too far.

    Args:
        low: Largest fall of a probability for negative advantages.
        high: Largest rise for positive ones.
        aggregation: How token losses become one number.
    """

    low: float = 0.2
    high: float = 0.2
    aggregation: Aggregation = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_positive("low", self.low, "0.2")
        require_positive("high", self.high, "0.2")

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""
        log_ratio = anchored_log_ratio(policy_logprobs, batch)
        keep = total_variation_keep(
            policy_logprobs, anchor(policy_logprobs, batch), batch.advantages, self.low, self.high
        )
        return _kept(log_ratio, batch, keep)


@dataclass(frozen=True)
class M2POLoss(PolicyLoss):
    """The plain ratio loss under a bound on the second moment of the log-ratios.

    Tokens are ranked within the micro-batch, so unlike every other loss this one depends (a
    little) on how the minibatch is split.

    Args:
        threshold: Largest mean of (log r)^2.
        aggregation: How token losses become one number.
    """

    threshold: float = 0.04
    aggregation: Aggregation = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_positive("threshold", self.threshold, "0.04")

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""
        log_ratio = anchored_log_ratio(policy_logprobs, batch)
        return _kept(
            log_ratio, batch, second_moment_keep(log_ratio, batch.loss_mask, self.threshold)
        )


def _kept(log_ratio: Tensor, batch: MicroBatch, keep: Tensor) -> tuple[Tensor, Metrics]:
    loss = -torch.where(keep, log_ratio.exp(), 0.0) * batch.advantages
    metrics = ratio_metrics(log_ratio, batch)
    dropped = ~keep
    rising = log_ratio.detach() > 0
    mask = batch.loss_mask
    metrics["ratio/clip_fraction_low"] = masked_mean((dropped & ~rising).float(), mask)
    metrics["ratio/clip_fraction_high"] = masked_mean((dropped & rising).float(), mask)
    return loss, metrics
