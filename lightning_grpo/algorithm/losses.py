"""Policy losses that clip: GRPO and its dual clip, GSPO, CISPO.

Each is a pure function on log-ratios and a small object that holds its settings. The ratio is that
of the policy to the anchor, `batch.proximal_logprobs`: the behavior policy where there is no
correction, else the trainer's own policy before the step. Losses are minimized, one per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_grpo.algorithm.aggregation import Aggregation, SequenceMean, TokenMean
from lightning_grpo.algorithm.batch import MicroBatch
from lightning_grpo.algorithm.layout import expand, sequence_mean
from lightning_grpo.algorithm.metrics import Metrics, masked_mean
from lightning_grpo.algorithm.ratio import anchored_log_ratio, ratio_metrics
from lightning_grpo.checks import require_clip, require_number
from lightning_grpo.errors import ConfigError

MAX_SEQUENCE_CLIP = 0.1
"""A bound on the length-normalized ratio beyond this is one on tokens, given by mistake."""


class PolicyLoss(ABC):
    """A policy loss: a callable of this form, with the aggregation that it is meant for.

    Attributes:
        aggregation: How its token losses become one number.
    """

    aggregation: Aggregation

    @abstractmethod
    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), `[tokens]`.

    Source: PPO, arXiv 1707.06347, equation 7; two bounds: DAPO, arXiv 2503.14476, equation 10.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def dual_clip_bound(loss: Tensor, advantages: Tensor, bound: float) -> Tensor:
    """For negative advantages, bounds the loss from above by -bound * A.

    Source: arXiv 1912.09729, equation 5.
    """
    return torch.where(advantages < 0, torch.minimum(loss, -bound * advantages), loss)


def sequence_log_ratio(log_ratio: Tensor, batch: MicroBatch) -> Tensor:
    """The length-normalized sequence log-ratio in token form, `[tokens]`.

    Its value at each token is the sequence's mean log-ratio, its gradient that of the token's own
    logprob: sg(s) * pi / sg(pi). With a mean over each sequence the gradient equals that of the
    sequence form. Source: GSPO, arXiv 2507.18071, equations 7 and 14 (GSPO-token).
    """
    mean = sequence_mean(log_ratio.detach(), batch.loss_mask, batch.cu_seqlens)
    return expand(mean, batch.cu_seqlens) + log_ratio - log_ratio.detach()


def weighted_log_likelihood(policy_logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """-sg(weights) A log pi, `[tokens]`. Source: CISPO, arXiv 2506.13585, equation 4."""
    return -weights.detach() * advantages * policy_logprobs


@dataclass(frozen=True)
class GRPOLoss(PolicyLoss):
    """The clipped surrogate of GRPO and DAPO.

    Args:
        clip_low: The ratio is clipped below at 1 - `clip_low`.
        clip_high: And above at 1 + `clip_high`.
        dual_clip: Bound c > 1 on the loss of negative advantages (3 is common).
        aggregation: How token losses become one number.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    aggregation: Aggregation = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            require_number(
                "dual_clip",
                self.dual_clip,
                above=1,
                why="it bounds the ratio from above",
                way_out="Way out: 3.0, or None for no bound.",
            )

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""
        log_ratio = anchored_log_ratio(policy_logprobs, batch)
        loss = clipped_surrogate(log_ratio, batch.advantages, self.clip_low, self.clip_high)
        metrics = ratio_metrics(log_ratio, batch, 1 - self.clip_low, 1 + self.clip_high)
        if self.dual_clip is not None:
            bounded = (batch.advantages < 0) & (log_ratio.exp() > self.dual_clip)
            metrics["ratio/dual_clip_fraction"] = masked_mean(bounded.float(), batch.loss_mask)
            loss = dual_clip_bound(loss, batch.advantages, self.dual_clip)
        return loss, metrics


@dataclass(frozen=True)
class GSPOLoss(PolicyLoss):
    """The clipped surrogate on the sequence's length-normalized ratio.

    Args:
        clip_low: The sequence ratio is clipped below at 1 - `clip_low`.
        clip_high: And above at 1 + `clip_high`.
        aggregation: How token losses become one number; GSPO is defined with the default.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    aggregation: Aggregation = field(default_factory=SequenceMean)

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_clip(self.clip_low, self.clip_high)
        # jsonargparse hands a loss of another class the settings of the same name: GRPO's clips.
        if max(self.clip_low, self.clip_high) > MAX_SEQUENCE_CLIP:
            raise ConfigError(
                f"`clip_low` and `clip_high` of GSPOLoss must be <= {MAX_SEQUENCE_CLIP} (a mean "
                f"over the sequence hardly moves), got {self.clip_low} and {self.clip_high}. "
                "Way out: state both, 3.0e-4 and 4.0e-4."
            )

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""
        log_ratio = sequence_log_ratio(anchored_log_ratio(policy_logprobs, batch), batch)
        loss = clipped_surrogate(log_ratio, batch.advantages, self.clip_low, self.clip_high)
        return loss, ratio_metrics(log_ratio, batch, 1 - self.clip_low, 1 + self.clip_high)


@dataclass(frozen=True)
class CISPOLoss(PolicyLoss):
    """Policy gradient weighted by the clipped ratio: no token loses its gradient.

    The bounds are relative to 1, as in the paper; `CappedCISPOLoss` takes an absolute cap.

    Args:
        clip_low: The weight is at least 1 - `clip_low`; 1 or more is no lower bound.
        clip_high: The weight is at most 1 + `clip_high`.
        aggregation: How token losses become one number.
    """

    clip_low: float = 1.0
    clip_high: float = 0.28
    aggregation: Aggregation = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number("clip_low", self.clip_low, least=0)
        require_clip(min(self.clip_low, 1.0), self.clip_high)

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""
        low, high = 1 - self.clip_low, 1 + self.clip_high
        return _clipped_weights(policy_logprobs, batch, low, high)


@dataclass(frozen=True)
class CappedCISPOLoss(PolicyLoss):
    """CISPO with an absolute upper cap and no lower bound. Source: ScaleRL, arXiv 2510.13786.

    Args:
        cap: The weight is at most this (not 1 + this).
        aggregation: How token losses become one number.
    """

    cap: float = 5.0
    aggregation: Aggregation = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number(
            "cap",
            self.cap,
            least=1,
            why="the ratio of unchanged weights",
            way_out="Way out: 5.0; for a bound relative to 1 use CISPOLoss.",
        )

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Unreduced loss `[tokens]`, and metrics by name."""
        return _clipped_weights(policy_logprobs, batch, 0.0, self.cap)


def _clipped_weights(
    policy_logprobs: Tensor, batch: MicroBatch, low: float, high: float
) -> tuple[Tensor, Metrics]:
    log_ratio = anchored_log_ratio(policy_logprobs, batch)
    weights = log_ratio.exp().clamp(low, high)
    likelihood = torch.where(batch.loss_mask, policy_logprobs, 0.0)
    loss = weighted_log_likelihood(likelihood, batch.advantages, weights)
    metrics = ratio_metrics(log_ratio, batch, low, high)
    # Weights are clipped whatever the sign of the advantage.
    ratio = log_ratio.detach().exp()
    metrics["ratio/clip_fraction_low"] = masked_mean((ratio < low).float(), batch.loss_mask)
    metrics["ratio/clip_fraction_high"] = masked_mean((ratio > high).float(), batch.loss_mask)
    return loss, metrics
