"""What to do about completions that ran into the length limit."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grpo.algorithm.layout import expand
from lightning_grpo.errors import ConfigError


def soft_overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """What to add to the rewards: from 0 at `max_tokens - buffer` down to -1 at `max_tokens`.

    Source: DAPO, arXiv 2503.14476, equation 13.

    Args:
        lengths: Tokens of each completion, `[trajectories]`.
        max_tokens: The longest completion, L_max.
        buffer: Length of the slope, L_cache.

    Returns:
        Penalties between -1 and 0, fp32 `[trajectories]`.
    """
    if not 0 < buffer <= max_tokens:
        raise ConfigError(
            f"`buffer` must be between 1 and `max_tokens` = {max_tokens}, got {buffer}. "
            "Way out: a fifth of `max_tokens`."
        )
    over = (lengths - (max_tokens - buffer)).to(torch.float32)
    return -(over / buffer).clamp(0.0, 1.0)


def drop_truncated(loss_mask: Tensor, truncated: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The loss mask without the tokens of truncated trajectories (the overlong filter).

    The caller counts the denominators from what is left.
    Source: DAPO, arXiv 2503.14476, section 3.4.

    Args:
        loss_mask: bool `[tokens]`.
        truncated: bool `[sequences]`.
        cu_seqlens: `[sequences + 1]`.

    Returns:
        bool `[tokens]`.
    """
    return loss_mask & ~expand(truncated, cu_seqlens)
