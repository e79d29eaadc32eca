"""How far the trainer's logprobs are from those the servers reported, and why.

On tokens of the weights that are being trained, any difference is a difference of the two programs
(`mismatch/...`). On older tokens it is mostly that of the weights (`offpolicy/...`). The two are
never mixed.
"""

from __future__ import annotations

from torch import Tensor

from lightning_grpo.algorithm.batch import MicroBatch
from lightning_grpo.algorithm.layout import log_ratio
from lightning_grpo.algorithm.metrics import EffectiveFraction, Metrics, masked_mean


def mismatch_metrics(policy_logprobs: Tensor, batch: MicroBatch, version: int) -> Metrics:
    """`mismatch/...` over sampled tokens of `version`, `offpolicy/...` over all older ones.

    k3 is the estimate of KL(behavior || policy) on samples of the behavior policy; `ess` the
    effective fraction of the older tokens under the weights policy / behavior.

    Args:
        policy_logprobs: Under the weights `version`, before the first step on them, `[tokens]`.
        batch: The micro-batch.
        version: The weight version that `policy_logprobs` were computed with.
    """
    sampled = batch.response_mask & batch.loss_mask
    current = sampled & (batch.weight_versions == version)
    older = sampled & (batch.weight_versions != version)
    difference = log_ratio(policy_logprobs.detach(), batch.behavior_logprobs, sampled)
    ratio = difference.exp()
    k3 = ratio - difference - 1
    weights = ratio * older
    return {
        "mismatch/abs_logprob_diff": masked_mean(difference.abs(), current),
        "mismatch/k3": masked_mean(k3, current),
        "offpolicy/abs_logprob_diff": masked_mean(difference.abs(), older),
        "offpolicy/k3": masked_mean(k3, older),
        "offpolicy/ess": EffectiveFraction(weights.sum(), weights.square().sum(), older.sum()),
    }
