"""Policy losses: aggregation, the ratio, clipped and trust-region losses; the KL penalty.

How token losses become one number: a weight for each token, with global denominators.

The sum of `weights * loss` over all tokens, micro-batches and ranks of a minibatch is its loss, so
a split into micro-batches changes nothing. Under a strategy that averages gradients over ranks the
caller multiplies by the number of ranks.

Policy losses that clip: GRPO and its dual clip, GSPO, CISPO.

Each is a pure function on log-ratios and a small object that holds its settings. The ratio is that
of the policy to the anchor, `batch.proximal_logprobs`: the behavior policy where there is no
correction, else the trainer's own policy before the step. Losses are minimized, one per token.

Policy losses that bound the step without a clip: SAPO's gate, DPPO's and M2PO's masks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_grpo.algorithm.batch import (
    MicroBatch,
    expand,
    log_ratio,
    sequence_mean,
    sequence_sum,
)
from lightning_grpo.algorithm.metrics import Metrics, masked_max, masked_mean
from lightning_grpo.errors import ConfigError, require_clip, require_number, require_positive


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


def anchor(policy_logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """What the ratio is taken to, detached: proximal logprobs, else the policy itself."""
    proximal = batch.proximal_logprobs
    return policy_logprobs.detach() if proximal is None else proximal.detach()


def anchored_log_ratio(policy_logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """log(policy / anchor), clamped; 0 outside `loss_mask`, `[tokens]`."""
    return log_ratio(policy_logprobs, anchor(policy_logprobs, batch), batch.loss_mask)


def ratio_metrics(
    log_ratio_: Tensor, batch: MicroBatch, low: float = -math.inf, high: float = math.inf
) -> Metrics:
    """`ratio/...` over the tokens of the loss.

    A token counts as clipped where the clip takes its gradient: above `high` with a positive
    advantage, below `low` with a negative one.
    """
    ratio, mask = log_ratio_.detach().exp(), batch.loss_mask
    clipped_low = (ratio < low) & (batch.advantages < 0)
    clipped_high = (ratio > high) & (batch.advantages > 0)
    return {
        "ratio/mean": masked_mean(ratio, mask),
        "ratio/max": masked_max(ratio, mask),
        "ratio/clip_fraction_low": masked_mean(clipped_low.float(), mask),
        "ratio/clip_fraction_high": masked_mean(clipped_high.float(), mask),
    }


MAX_SEQUENCE_CLIP = 0.1
"""A bound on the length-normalized ratio beyond this is one on tokens, given by mistake."""


class PolicyLoss(ABC):
    """A policy loss: a callable of this form, with the aggregation that it is meant for.

    Attributes:
        aggregation: How its token losses become one number.
        is_zero_at_zero_advantage: Whether a token without an advantage has no gradient, so that a
            trajectory of them needs no pass. A class that computes its own loss must say so itself.
    """

    aggregation: Aggregation
    is_zero_at_zero_advantage: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take nothing for granted of a class that overrides the loss."""
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls) and "is_zero_at_zero_advantage" not in vars(cls):
            cls.is_zero_at_zero_advantage = False

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

    is_zero_at_zero_advantage = True

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

    is_zero_at_zero_advantage = True

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

    is_zero_at_zero_advantage = True

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

    is_zero_at_zero_advantage = True

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

    is_zero_at_zero_advantage = True

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

    is_zero_at_zero_advantage = True

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


# -- the distance to a reference policy ------------------------------------------------------------


class KLEstimator(ABC):
    """Estimates the divergence from the reference at each token.

    With l = log(pi / ref) per token: k1 = l, k2 = l^2 / 2, k3 = exp(-l) + l - 1 (Schulman,
    "Approximating KL divergence", 2020). Each is a penalty on the next token, given the tokens
    before it: KL below is the divergence of that token's two distributions. Expected over samples
    of the policy:

    | in the loss | gradient |
    |---|---|
    | k1 | 0: useless |
    | k2 | of KL(pi || ref) |
    | k3 | of KL(ref || pi), the other direction |
    | ratio-weighted k3, gradient through the ratio | of KL(pi || ref), on samples of any policy |

    The last is DeepSeek-V3.2's (arXiv 2512.02556, section 3.1) and the default.

    None has the gradient of the KL between whole sequences. Of two tokens x, y that is the gradient
    of KL(x), plus the mean over x of the gradient of KL(y | x), plus the mean over x of grad log
    pi(x) * KL(y | x): a first token is also to blame for the divergence that it leads to. The
    estimators leave out that last term: a policy may drift into contexts in which it differs from
    the reference, at no cost for the tokens that lead there.
    """

    @abstractmethod
    def __call__(
        self, policy_logprobs: Tensor, reference_logprobs: Tensor, batch: MicroBatch
    ) -> Tensor:
        """`[tokens]`, with gradient; 0 outside `loss_mask`."""


@dataclass(frozen=True)
class K1(KLEstimator):
    """log(pi / ref). A value to log or to subtract from a reward; as a loss it does nothing."""

    def __call__(
        self, policy_logprobs: Tensor, reference_logprobs: Tensor, batch: MicroBatch
    ) -> Tensor:
        """`[tokens]`, with gradient; 0 outside `loss_mask`."""
        return log_ratio(policy_logprobs, reference_logprobs, batch.loss_mask)


@dataclass(frozen=True)
class K2(KLEstimator):
    """log(pi / ref)^2 / 2. On-policy its gradient is that of the next token's KL(pi || ref)."""

    def __call__(
        self, policy_logprobs: Tensor, reference_logprobs: Tensor, batch: MicroBatch
    ) -> Tensor:
        """`[tokens]`, with gradient; 0 outside `loss_mask`."""
        return log_ratio(policy_logprobs, reference_logprobs, batch.loss_mask).square() / 2


@dataclass(frozen=True)
class K3(KLEstimator):
    """ref / pi - log(ref / pi) - 1, GRPO's: on-policy the next token's KL(ref || pi) in gradient.

    Source: GRPO, arXiv 2402.03300, equation 4.
    """

    def __call__(
        self, policy_logprobs: Tensor, reference_logprobs: Tensor, batch: MicroBatch
    ) -> Tensor:
        """`[tokens]`, with gradient; 0 outside `loss_mask`."""
        difference = log_ratio(policy_logprobs, reference_logprobs, batch.loss_mask)
        return (-difference).exp() + difference - 1


@dataclass(frozen=True)
class WeightedK3(KLEstimator):
    """k3 times pi / behavior, with gradient through the ratio too: unbiased off-policy.

    That is, for the next token after the tokens that were sampled: the behavior policy chose these,
    and no gradient makes them likelier or less likely for what they lead to.

    Source: DeepSeek-V3.2, arXiv 2512.02556, section 3.1.
    """

    def __call__(
        self, policy_logprobs: Tensor, reference_logprobs: Tensor, batch: MicroBatch
    ) -> Tensor:
        """`[tokens]`, with gradient; 0 outside `loss_mask`."""
        ratio = log_ratio(policy_logprobs, batch.behavior_logprobs, batch.loss_mask).exp()
        return ratio * K3()(policy_logprobs, reference_logprobs, batch)


@dataclass(frozen=True)
class KLPenalty:
    """Adds coefficient * KL to each token's loss.

    Args:
        coefficient: How much.
        estimator: Which estimate.
        reference: Hub id or folder of the reference model; None is the model at the start.
        offload: Keep the reference in host memory between its passes, one for each rollout batch.
    """

    coefficient: float
    estimator: KLEstimator = field(default_factory=WeightedK3)
    reference: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number(
            "coefficient",
            self.coefficient,
            above=0,
            way_out="Way out: `kl: null` for no penalty; then no reference model is loaded.",
        )
        if isinstance(self.estimator, K1):
            raise ConfigError(
                "`estimator` must have a gradient, got K1 (its expected gradient is 0). "
                "Way out: WeightedK3."
            )

    def __call__(self, policy_logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """The penalty `[tokens]`, and `policy/kl_reference` (without the coefficient)."""
        if batch.reference_logprobs is None:
            raise ValueError("`batch.reference_logprobs` must be set for a KL penalty, got None.")
        estimate = self.estimator(policy_logprobs, batch.reference_logprobs.detach(), batch)
        metrics: Metrics = {"policy/kl_reference": masked_mean(estimate, batch.loss_mask)}
        return self.coefficient * estimate, metrics
