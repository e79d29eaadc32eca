"""What a completion that ran into the length limit gets, and whether it counts in its group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.checks import MOST, require_number
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import Sampling

Handling = Literal["train", "mask", "exclude"]

_IN_WORDS = {
    "train": "trained on like any other",
    "mask": "out of the loss, in its group's baseline",
    "exclude": "neither in the loss nor in its group's baseline",
}


def soft_overlong_penalty(lengths: Tensor, limits: Tensor, buffer: int) -> Tensor:
    """What to add to the rewards: from 0 at `limits - buffer` down to -1 at `limits`.

    Source: DAPO, arXiv 2503.14476, equation 13.

    Args:
        lengths: Tokens of each completion, `[trajectories]`.
        limits: The longest that each could have been, L_max, `[trajectories]`.
        buffer: Length of the slope, L_cache.

    Returns:
        Penalties between -1 and 0, fp32 `[trajectories]`.
    """
    over = (lengths - (limits - buffer)).to(torch.float32)
    return -(over / buffer).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Truncation:
    """What a completion that ran into the length limit gets, and whether it counts in its group.

    A trajectory of several turns is truncated if its last completion is, and the penalty is on
    that one.

    Args:
        handling: `train` on it like on any other; `mask` it: it counts in its group, its tokens
            leave the loss and its denominators (DAPO's overlong filter, section 3.4); `exclude`
            it: as if it had not been sampled.
        reward: What a truncated one gets in the place of its reward; None leaves it.
        penalty_buffer: Tokens before the limit over which a penalty of up to 1 grows, for every
            completion (DAPO's soft overlong punishment); None is no penalty.
    """

    handling: Handling = "train"
    reward: float | None = None
    penalty_buffer: int | None = None

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.handling not in _IN_WORDS:
            raise ConfigError(
                f"`truncation.handling` must be one of {', '.join(_IN_WORDS)} (what a truncated "
                f"completion is used for), got {self.handling!r}. Way out: train."
            )
        if self.reward is not None:
            require_number("truncation.reward", self.reward, least=-MOST, way_out="Way out: null.")
        if self.penalty_buffer is not None:
            require_number(
                "truncation.penalty_buffer",
                self.penalty_buffer,
                least=1,
                whole=True,
                why="tokens that the penalty grows over",
                way_out="Way out: a fifth of `max_new_tokens`, or null.",
            )
        if self.handling == "exclude" and self.reward is not None:
            raise ConfigError(
                "`truncation.reward` must be null with `handling: exclude` (nobody sees it), got "
                f"{self.reward}. Way out: leave it out."
            )

    def __str__(self) -> str:
        """In words, for the summary at the start."""
        said = _IN_WORDS[self.handling]
        if self.reward is not None:
            said += f"; its reward is {self.reward:g}"
        if self.penalty_buffer is not None:
            said += f"; a penalty over the last {self.penalty_buffer} tokens before the limit"
        return said

    def check(self, sampling: Sampling | None) -> None:
        """Refuse a buffer longer than a completion can be.

        Args:
            sampling: Of the workflow; None where it keeps it to itself.
        """
        if sampling is None or self.penalty_buffer is None:
            return
        if self.penalty_buffer > sampling.max_new_tokens:
            raise ConfigError(
                "`truncation.penalty_buffer` must be <= `sampling.max_new_tokens` "
                f"({sampling.max_new_tokens}), got {self.penalty_buffer}. "
                "Way out: a fifth of it."
            )

    def rewards(self, batch: RolloutBatch) -> Tensor:
        """The rewards that advantages are computed from, `[trajectories]`."""
        rewards = batch.rewards
        if self.reward is not None:
            rewards = torch.where(batch.truncated, self.reward, rewards)
        if self.penalty_buffer is None:
            return rewards
        unknown = batch.length_limits == 0
        if unknown.any():
            raise ConfigError(
                "`truncation.penalty_buffer` needs the length limit of each completion, which "
                f"{int(unknown.sum())} of these trajectories don't say. Way out: null."
            )
        penalty = soft_overlong_penalty(
            batch.last_lengths, batch.length_limits, self.penalty_buffer
        )
        return rewards + penalty

    def in_loss(self, batch: RolloutBatch) -> Tensor:
        """Which trajectories enter the loss and its denominators, bool `[trajectories]`."""
        if self.handling == "train":
            return torch.ones_like(batch.truncated)
        return ~batch.truncated

    def advantages(
        self, advantage: Callable[[Tensor, Tensor], Tensor], rewards: Tensor, batch: RolloutBatch
    ) -> Tensor:
        """Advantages of the whole rollout batch; those of excluded trajectories are 0.

        Args:
            advantage: `(rewards, group_ids) -> [trajectories]` (or `[tokens]`, unless some
                trajectories are excluded).
            rewards: Of the batch, `[trajectories]`.
            batch: The rollout batch.
        """
        if self.handling != "exclude" or not batch.truncated.any():
            return advantage(rewards, batch.group_ids)
        counted = ~batch.truncated
        advantages = torch.zeros_like(rewards)
        if counted.any():
            found = advantage(rewards[counted], batch.group_ids[counted])
            if len(found) != int(counted.sum()):
                raise ConfigError(
                    "`truncation.handling: exclude` needs one advantage per trajectory, got "
                    f"{len(found)} for {int(counted.sum())}. Way out: mask."
                )
            advantages[counted] = found.to(advantages.dtype)
        return advantages
