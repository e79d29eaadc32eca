"""Metrics that reduce over micro-batches and ranks, and those of rollouts and mismatch.

Numbers that know how they reduce: over micro-batches by `merge`, over ranks by two all-reduces.

The tensors stay where they were computed until `values` is called, so that logging never makes
the device wait in the middle of a step.

How far the trainer's logprobs are from those the servers reported, and why.

On tokens of the weights that are being trained, any difference is a difference of the two programs
(`mismatch/...`). On older tokens it is mostly that of the weights (`offpolicy/...`). The two are
never mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.algorithm.advantages import has_no_variance
from lightning_grpo.algorithm.batch import MicroBatch, RolloutBatch, log_ratio

Number = Tensor | float


def _maximum(left: Number, right: Number) -> Number:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        device = left.device if isinstance(left, Tensor) else None
        device = right.device if device is None and isinstance(right, Tensor) else device
        return torch.maximum(
            torch.as_tensor(left, device=device), torch.as_tensor(right, device=device)
        )
    return max(left, right)


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, kept as its two sums; over nothing it is NaN.

    Args:
        total: Sum of weight times value.
        weight: Sum of the weights (most often a number of tokens).
    """

    total: Number
    weight: Number

    def merge(self, other: Mean) -> Mean:
        """The mean over both parts."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def sums(self) -> tuple[Number, ...]:
        """What is added up over ranks."""
        return (self.total, self.weight)

    def value(self) -> float:
        """The number to log."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else math.nan


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum, such as a number of tokens."""

    total: Number

    def merge(self, other: Sum) -> Sum:
        """The sum of both parts."""
        return Sum(self.total + other.total)

    def sums(self) -> tuple[Number, ...]:
        """What is added up over ranks."""
        return (self.total,)

    def value(self) -> float:
        """The number to log."""
        return float(self.total)


@dataclass(frozen=True, slots=True)
class EffectiveFraction:
    """Kish's effective sample size as a fraction of the samples: (sum w)^2 / (n sum w^2).

    1 when all weights are equal, 1/n when one sample carries everything.
    Source: Kish, Survey Sampling, 1965.
    """

    total: Number
    squares: Number
    count: Number

    def merge(self, other: EffectiveFraction) -> EffectiveFraction:
        """The fraction over both parts."""
        return EffectiveFraction(
            self.total + other.total, self.squares + other.squares, self.count + other.count
        )

    def sums(self) -> tuple[Number, ...]:
        """What is added up over ranks."""
        return (self.total, self.squares, self.count)

    def value(self) -> float:
        """The number to log."""
        denominator = float(self.count) * float(self.squares)
        return float(self.total) ** 2 / denominator if denominator else math.nan


@dataclass(frozen=True, slots=True)
class Max:
    """A maximum; over nothing it is minus infinity."""

    maximum: Number

    def merge(self, other: Max) -> Max:
        """The larger of both."""
        return Max(_maximum(self.maximum, other.maximum))

    def sums(self) -> tuple[Number, ...]:
        """Nothing is added up: see `to_tensors`."""
        return ()

    def value(self) -> float:
        """The number to log."""
        return float(self.maximum)


Metric = Mean | Sum | EffectiveFraction | Max
Metrics = dict[str, Metric]

_NUM_SUMS: dict[type, int] = {Mean: 2, Sum: 1, EffectiveFraction: 3, Max: 0}


def merge(left: Mapping[str, Metric], right: Mapping[str, Metric]) -> Metrics:
    """Both dictionaries in one; a name in both is reduced by its own kind.

    Raises:
        TypeError: A name stands for two kinds of metric.
    """
    merged = dict(left)
    for name, metric in right.items():
        seen = merged.get(name)
        if seen is not None and type(seen) is not type(metric):
            raise TypeError(
                f"metric `{name}` must be of one kind, got {type(seen).__name__} and "
                f"{type(metric).__name__}."
            )
        merged[name] = metric if seen is None else seen.merge(metric)  # type: ignore[arg-type]
    return merged


def _stack(numbers: Sequence[Number], device: torch.device | str) -> Tensor:
    values = [torch.as_tensor(n, dtype=torch.float64).detach().to(device) for n in numbers]
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64, device=device)


def to_tensors(
    metrics: Mapping[str, Metric], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The metrics as two vectors, in order of name: one to all-reduce by SUM, one by MAX.

    The names and kinds must be the same on all ranks.
    """
    ordered = [metrics[name] for name in sorted(metrics)]
    sums = [number for metric in ordered for number in metric.sums()]
    maxima = [metric.maximum for metric in ordered if isinstance(metric, Max)]
    return _stack(sums, device), _stack(maxima, device)


def from_tensors(like: Mapping[str, Metric], sums: Tensor, maxima: Tensor) -> Metrics:
    """The inverse of `to_tensors`, with the names and kinds of `like`."""
    remaining_sums, remaining_maxima = iter(sums.tolist()), iter(maxima.tolist())
    restored: Metrics = {}
    for name in sorted(like):
        kind = type(like[name])
        if kind is Max:
            restored[name] = Max(next(remaining_maxima))
        else:
            restored[name] = kind(*(next(remaining_sums) for _ in range(_NUM_SUMS[kind])))
    return restored


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers to log; a mean or a maximum over nothing is left out."""
    numbers = {name: metric.value() for name, metric in metrics.items()}
    return {name: number for name, number in numbers.items() if not _is_empty(number)}


def _is_empty(number: float) -> bool:
    return math.isnan(number) or number == -math.inf


def masked_mean(values_: Tensor, mask: Tensor) -> Mean:
    """Mean of `values_ [tokens]` where `mask [tokens]` is true."""
    return Mean(torch.where(mask, values_.detach(), 0.0).sum(), mask.sum())


def masked_max(values_: Tensor, mask: Tensor) -> Max:
    """Maximum of `values_ [tokens]` where `mask [tokens]` is true."""
    if values_.numel() == 0:
        return Max(-math.inf)
    return Max(torch.where(mask, values_.detach(), -math.inf).max())


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
