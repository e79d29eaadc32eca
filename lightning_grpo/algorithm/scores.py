"""Attention whose scores are bent, in plain operations: soft caps (Gemma 2), sinks (gpt-oss).

The trainer and the embedded engine compute it by the same function. No kernel of torch knows caps
or sinks, so that all scores of a row exist at once: slower, and memory of length squared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreForm:
    """What is done to scores before they become weights.

    Attributes:
        softcap: They are bent so that none is beyond it; None: they are not.
        sinks: `[heads]`: the score of one more key, to which each query gives a share of its
            attention and which has no value; None: there is none.
    """

    softcap: float | None
    sinks: Tensor | None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self | None:
        """By the names under which transformers hands them to attention; None: neither is there."""
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        return None if softcap is None and sinks is None else cls(softcap, sinks)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, bool `[length, length]`.

    Args:
        length: Of the sequence.
        window: Tokens that one can see, itself included; None: all before it.
        device: Where.
    """
    steps = torch.arange(length, device=device)
    distance = steps.unsqueeze(1) - steps.unsqueeze(0)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def bent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float | None,
    form: ScoreForm,
) -> Tensor:
    """Attention `[batch, heads, queries, value_dim]`; scores and weights are fp32 or wider.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key heads, keys, head_dim]`; each head serves as many of the query's.
        value: `[batch, key heads, keys, value_dim]`.
        visible: Which keys each query sees, one at least; bool, as `[batch, heads, queries, keys]`.
        scale: Of the scores; None is 1 / sqrt(head_dim).
        form: What is done to them.
    """
    batch, heads, queries, dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, key.shape[1], -1, dim)
    products = (grouped @ key.to(wide).transpose(2, 3)).reshape(batch, heads, queries, -1)
    scores = products * (dim**-0.5 if scale is None else scale)
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.to(wide).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    mixed = weights.reshape(batch, key.shape[1], -1, key.shape[2]) @ value.to(wide)
    return mixed.reshape(batch, heads, queries, -1).to(value.dtype)
