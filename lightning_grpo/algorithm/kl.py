"""Penalties for leaving a reference policy.

With l = log(pi / ref) per token: k1 = l, k2 = l^2 / 2, k3 = exp(-l) + l - 1 (Schulman,
"Approximating KL divergence", 2020). Each is a penalty on the next token, given the tokens before
it: KL below is the divergence of that token's two distributions. Expected over samples of the
policy:

| in the loss | gradient |
|---|---|
| k1 | 0: useless |
| k2 | of KL(pi || ref) |
| k3 | of KL(ref || pi), the other direction |
| ratio-weighted k3, gradient through the ratio | of KL(pi || ref), on samples of any policy |

The last is DeepSeek-V3.2's (arXiv 2512.02556, section 3.1) and the default.

None has the gradient of the KL between whole sequences. Of two tokens x, y that is the gradient of
KL(x), plus the mean over x of the gradient of KL(y | x), plus the mean over x of
grad log pi(x) * KL(y | x): a first token is also to blame for the divergence that it leads to. The
estimators leave out that last term: a policy may drift into contexts in which it differs from the
reference, at no cost for the tokens that lead there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from lightning_grpo.algorithm.batch import MicroBatch, log_ratio
from lightning_grpo.algorithm.metrics import Metrics, masked_mean
from lightning_grpo.errors import ConfigError, require_number


class KLEstimator(ABC):
    """Estimates the divergence from the reference at each token."""

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
