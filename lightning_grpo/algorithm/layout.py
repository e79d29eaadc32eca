"""Arithmetic on the packed layout: `[tokens]` with `cu_seqlens [sequences + 1]`."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus or minus this: exp(20) is 5e8, beyond any use."""


def sequence_ids(cu_seqlens: Tensor) -> Tensor:
    """Which sequence each token belongs to, int64 `[tokens]`."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def token_positions(cu_seqlens: Tensor) -> Tensor:
    """Positions that restart in each sequence, int64 `[tokens]`."""
    cu_seqlens = cu_seqlens.long()
    tokens = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    return tokens - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())


def expand(per_sequence: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Repeats `per_sequence [sequences]` for each of its tokens: `[tokens]`."""
    return torch.repeat_interleave(per_sequence, cu_seqlens.diff())


def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of `values [tokens]` over each sequence: `[sequences]`."""
    totals = values.new_zeros(len(cu_seqlens) - 1)
    return totals.index_add(0, sequence_ids(cu_seqlens), values)


def sequence_mean(values: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of `values [tokens]` over each sequence's tokens in `mask`; 0 where there is none."""
    totals = sequence_sum(torch.where(mask, values, 0.0), cu_seqlens)
    return totals / sequence_sum(mask.to(values.dtype), cu_seqlens).clamp_min(1.0)


def packed_rows(cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    """Positions of the tokens of sequences `rows`, one sequence after the other."""
    lengths = cu_seqlens.diff()[rows]
    ends = lengths.cumsum(0)
    offsets = cu_seqlens[rows] - (ends - lengths)
    total = int(ends[-1]) if len(ends) else 0
    return torch.arange(total, device=rows.device) + torch.repeat_interleave(offsets, lengths)


def log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """`numerator - denominator` where `mask`, else 0; clamped to +-20, `[tokens]`.

    Tokens outside the mask may hold anything, NaN included: they reach neither value nor gradient.
    """
    difference = torch.where(mask, numerator, 0.0) - torch.where(mask, denominator, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
