"""What a rollout batch says of itself before anything is trained on it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grpo.algorithm.advantages import has_no_variance
from lightning_grpo.algorithm.batch import RolloutBatch


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
    """`reward/...`, `completion/...` and `staleness/...` of a whole rollout batch."""
    rewards = batch.rewards
    lengths = batch.response_lengths.float()
    staleness = (batch.version - group_minimum(batch.oldest_versions, batch.group_ids)).float()
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(unbiased=False),
        "reward/zero_variance_fraction": zero_variance_fraction(rewards, batch.group_ids),
        "completion/length_mean": lengths.mean(),
        "completion/length_max": lengths.max(),
        "completion/truncated_fraction": batch.truncated.float().mean(),
        "staleness/mean": staleness.mean(),
        "staleness/max": staleness.max(),
    }
    for name, values in batch.rewards_by_name.items():
        metrics[f"reward/{name}/mean"] = values.nanmean()
    for name in sorted(set(batch.datasets) - {""}):
        of_it = torch.tensor([dataset == name for dataset in batch.datasets])
        metrics[f"dataset/{name}/reward_mean"] = rewards[of_it].mean()
        metrics[f"dataset/{name}/fraction"] = of_it.float().mean()
    return {name: float(value) for name, value in metrics.items()}


def zero_variance_fraction(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """The share of groups whose rewards are all equal: they teach nothing."""
    flat = group_ids[has_no_variance(rewards, group_ids)].unique()
    return torch.tensor(len(flat) / len(group_ids.unique()))


def group_minimum(values: Tensor, group_ids: Tensor) -> Tensor:
    """The smallest value of each group, `[groups]`."""
    groups, index = group_ids.unique(return_inverse=True)
    start = values.max().expand(len(groups)).clone()
    return start.scatter_reduce(0, index, values, reduce="amin")
