"""The ratio of the policy to its anchor, and what is logged about it."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_grpo.algorithm.batch import MicroBatch
from lightning_grpo.algorithm.layout import log_ratio
from lightning_grpo.algorithm.metrics import Metrics, masked_max, masked_mean


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
