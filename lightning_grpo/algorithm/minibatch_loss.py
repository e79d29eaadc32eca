"""The loss of one micro-batch, whole: what the module and programs with Fabric call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_grpo.algorithm.aggregation import Aggregation
from lightning_grpo.algorithm.batch import MicroBatch
from lightning_grpo.algorithm.corrections import Correction
from lightning_grpo.algorithm.kl import KLPenalty
from lightning_grpo.algorithm.metrics import Metrics, masked_mean, merge

TokenLoss = Callable[[Tensor, MicroBatch], tuple[Tensor, Metrics]]


def minibatch_loss(
    policy_logprobs: Tensor,
    batch: MicroBatch,
    loss: TokenLoss,
    *,
    aggregation: Aggregation,
    correction: Correction | None = None,
    kl: KLPenalty | None = None,
    entropy_coefficient: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """This micro-batch's part of the minibatch's loss: the parts add up over ranks too.

    Per token: loss times the correction's weight, plus the KL penalty, minus the entropy bonus;
    then the aggregation's weighted sum with the global denominators of the minibatch.

    Args:
        policy_logprobs: Under the policy being trained, with gradient, `[tokens]`.
        batch: The micro-batch. Without `proximal_logprobs` the policy anchors its own clip.
        loss: A policy loss, or a module's `token_loss`.
        aggregation: How token losses become one number (most often `loss.aggregation`).
        correction: Weights for samples of another policy.
        kl: Penalty for leaving the reference policy.
        entropy_coefficient: Bonus for entropy; needs `batch.entropy` with gradient.

    Returns:
        The scalar to call `backward` on, and metrics by name.
    """
    batch = batch.with_proximal(policy_logprobs)
    token_loss, metrics = loss(policy_logprobs, batch)
    if correction is not None and batch.proximal_logprobs is not None:
        weights, more = correction(batch.proximal_logprobs, batch)
        token_loss, metrics = token_loss * weights.detach(), merge(metrics, more)
    if kl is not None:
        penalty, more = kl(policy_logprobs, batch)
        token_loss, metrics = token_loss + penalty, merge(metrics, more)
    if batch.entropy is not None:
        entropy = torch.where(batch.loss_mask, batch.entropy, 0.0)
        metrics = merge(metrics, {"policy/entropy": masked_mean(entropy, batch.loss_mask)})
        if entropy_coefficient:
            token_loss = token_loss - entropy_coefficient * entropy
    elif entropy_coefficient:
        raise ValueError("`batch.entropy` must be set for an entropy bonus, got None.")
    # A token outside the mask may carry NaN from a user's loss; 0 * NaN would spread it.
    masked = torch.where(batch.loss_mask, token_loss, 0.0)
    return (aggregation.weights(batch) * masked).sum(), metrics
