"""From the rewards of whole groups to one advantage per trajectory.

All take `rewards [trajectories]` and `group_ids [trajectories]` (any integers, in any order) and
return `[trajectories]` in fp32, as losses take them. With a baseline, a group whose rewards are all
equal gets exactly 0: the smallest reward of the group is subtracted first, so no rounding of a mean
can leave a rest. All is computed in fp64: in fp32 the square of a reward of 1e20 is infinite, and
1e8 + 1 is 1e8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_grpo.checks import require_number
from lightning_grpo.errors import ConfigError


class Advantage(ABC):
    """Turns the rewards of whole groups into advantages."""

    @abstractmethod
    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """fp32 `[trajectories]` from `[trajectories]`."""


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
        require_number(
            "eps",
            self.eps,
            above=0,
            why="a group may have no spread",
            way_out="Way out: leave it at 1e-4.",
        )

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """fp32 `[trajectories]` from `[trajectories]`."""
        centered = _centered(rewards, group_ids)
        if self.divide_by_std:
            centered = centered / (group_std(rewards.double(), group_ids, self.ddof) + self.eps)
        return centered.float()


@dataclass(frozen=True)
class LeaveOneOutAdvantage(Advantage):
    """Reward minus the mean of the group's other rewards; 0 in a group of one.

    Source: RLOO, arXiv 2402.14740, section 2.3 (equation 6), after Kool et al. 2019.
    """

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """fp32 `[trajectories]` from `[trajectories]`."""
        count = group_size(group_ids).double()
        scale = count / (count - 1).clamp_min(1)
        return (_centered(rewards, group_ids) * scale).float()


@dataclass(frozen=True)
class ReinforceAdvantage(Advantage):
    """The reward itself: no baseline, so an all-equal group is not zeroed.

    Source: Williams 1992, equation 1 with b = 0.
    """

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """fp32 `[trajectories]` from `[trajectories]`."""
        del group_ids
        return rewards.float().clone()


def group_size(group_ids: Tensor) -> Tensor:
    """Number of trajectories in the group of each trajectory, int64 `[trajectories]`."""
    _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    sizes: Tensor = counts[inverse]
    return sizes


def group_mean(values: Tensor, group_ids: Tensor) -> Tensor:
    """Mean over the group of each trajectory, `[trajectories]` in the dtype of `values`."""
    _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    totals = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    means = totals.index_add(0, inverse, values.double()) / counts
    return _as(values, means[inverse])


def group_std(values: Tensor, group_ids: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation over the group of each trajectory, `[trajectories]`; 0 if all equal."""
    centered = _centered(values, group_ids)
    # In units of the largest deviation, no square is too large or too small for a float.
    unit = _extreme(centered.abs(), group_ids, "amax")
    squares = (centered / torch.where(unit > 0, unit, 1.0)).square()
    count = group_size(group_ids).double()
    variance = group_mean(squares, group_ids) * count / (count - ddof).clamp_min(1)
    return _as(values, variance.sqrt() * unit)


def has_no_variance(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Whether all rewards of the group are equal, bool `[trajectories]`."""
    return _extreme(rewards, group_ids, "amin") == _extreme(rewards, group_ids, "amax")


def _centered(values: Tensor, group_ids: Tensor) -> Tensor:
    """Values minus the mean of their group, fp64; exactly 0 if all are equal."""
    shifted = values.double() - _extreme(values.double(), group_ids, "amin")
    return shifted - group_mean(shifted, group_ids)


def _extreme(values: Tensor, group_ids: Tensor, which: Literal["amin", "amax"]) -> Tensor:
    """The smallest or largest value of the group of each trajectory, `[trajectories]`."""
    unique, inverse = torch.unique(group_ids, return_inverse=True)
    found = values.new_zeros(len(unique))
    found = found.scatter_reduce(0, inverse, values, reduce=which, include_self=False)
    return found[inverse]


def _as(values: Tensor, computed: Tensor) -> Tensor:
    return computed.to(values.dtype) if values.is_floating_point() else computed
