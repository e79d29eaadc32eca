"""From the rewards of whole groups to one advantage per trajectory.

All take `rewards [trajectories]` and `group_ids [trajectories]` (any integers, in any order) and
return `[trajectories]`. With a baseline, a group whose rewards are all equal gets exactly 0: the
smallest reward of the group is subtracted first, so no rounding of a mean can leave a rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.errors import ConfigError


class Advantage(ABC):
    """Turns the rewards of whole groups into advantages."""

    @abstractmethod
    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """`[trajectories]` from `[trajectories]`."""


@dataclass(frozen=True)
class GroupAdvantage(Advantage):
    """Reward minus the mean of its group, divided by the group's standard deviation.

    `divide_by_std=False` is the advantage of Dr.GRPO.
    Source: GRPO, arXiv 2402.03300, section 4.1.2; Dr.GRPO, arXiv 2503.20783, section 3.2.

    Args:
        divide_by_std: Whether to divide.
        ddof: 1 for the sample's standard deviation, 0 for the population's.
        eps: Added to the standard deviation.
    """

    divide_by_std: bool = True
    ddof: int = 1
    eps: float = 1e-4

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.ddof not in (0, 1):
            raise ConfigError(f"`ddof` must be 0 or 1, got {self.ddof}. Way out: leave it at 1.")
        if self.eps <= 0:
            raise ConfigError(
                f"`eps` must be > 0 (a group may have no spread), got {self.eps}. "
                "Way out: leave it at 1e-4."
            )

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """`[trajectories]` from `[trajectories]`."""
        centered = rewards - _shift(rewards, group_ids)
        centered = centered - group_mean(centered, group_ids)
        if not self.divide_by_std:
            return centered
        return centered / (group_std(rewards, group_ids, self.ddof) + self.eps)


@dataclass(frozen=True)
class LeaveOneOutAdvantage(Advantage):
    """Reward minus the mean of the group's other rewards; 0 in a group of one.

    Source: RLOO, arXiv 2402.14740, section 2.3 (equation 6), after Kool et al. 2019.
    """

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """`[trajectories]` from `[trajectories]`."""
        centered = rewards - _shift(rewards, group_ids)
        count = group_size(group_ids).to(rewards.dtype)
        scale = count / (count - 1).clamp_min(1)
        return (centered - group_mean(centered, group_ids)) * scale


@dataclass(frozen=True)
class ReinforceAdvantage(Advantage):
    """The reward itself: no baseline, so an all-equal group is not zeroed.

    Source: Williams 1992, equation 1 with b = 0.
    """

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """`[trajectories]` from `[trajectories]`."""
        del group_ids
        return rewards.clone()


def group_size(group_ids: Tensor) -> Tensor:
    """Number of trajectories in the group of each trajectory, int64 `[trajectories]`."""
    _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    sizes: Tensor = counts[inverse]
    return sizes


def group_mean(values: Tensor, group_ids: Tensor) -> Tensor:
    """Mean over the group of each trajectory, `[trajectories]`."""
    _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    totals = values.new_zeros(len(counts)).index_add(0, inverse, values)
    means: Tensor = totals / counts.to(values.dtype)
    return means[inverse]


def group_std(values: Tensor, group_ids: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation over the group of each trajectory, `[trajectories]`; 0 if all equal."""
    shifted = values - _shift(values, group_ids)
    centered = shifted - group_mean(shifted, group_ids)
    divisor = (group_size(group_ids) - ddof).clamp_min(1).to(values.dtype)
    count = group_size(group_ids).to(values.dtype)
    return (group_mean(centered.square(), group_ids) * count / divisor).sqrt()


def has_no_variance(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Whether all rewards of the group are equal, bool `[trajectories]`."""
    return group_std(rewards, group_ids) == 0


def _shift(values: Tensor, group_ids: Tensor) -> Tensor:
    unique, inverse = torch.unique(group_ids, return_inverse=True)
    smallest = values.new_zeros(len(unique))
    smallest = smallest.scatter_reduce(0, inverse, values, reduce="amin", include_self=False)
    return smallest[inverse]
