"""Rounding that keeps small updates: what to the nearest loses, by chance is kept on average."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_FP32_BITS = 23


def round_by_chance(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rounds up or down, the nearer the likelier, so that the mean over elements is kept.

    Stochastic rounding (Gupta et al., "Deep Learning with Limited Numerical Precision",
    arXiv 1502.02551, section 3). A value that `dtype` can hold stays itself. The draw depends on
    `name` and the place in the tensor alone: equal values always round alike.

    Args:
        values: fp32.
        dtype: bf16 or fp16; others round to the nearest.
        name: Of the parameter; others draw independently of it.

    Returns:
        The same shape, in `dtype`; what is not finite stays so.
    """
    lost = _num_lost_bits(dtype)
    if values.dtype != torch.float32 or lost <= 0:
        return values.to(dtype)
    generator = torch.Generator(values.device).manual_seed(zlib.crc32(name.encode()))
    draw = torch.randint(
        1 << lost, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    # The bits that are lost, as a number, are the chance of rounding away from zero: a carry.
    bits = values.contiguous().view(torch.int32).add(draw).bitwise_and_(-(1 << lost))
    rounded = bits.view(torch.float32)
    # A NaN of all ones, which is CUDA's, would carry into the sign and be a zero.
    return rounded.where(values.isfinite(), values).to(dtype)


def _num_lost_bits(dtype: torch.dtype) -> int:
    if not dtype.is_floating_point:
        return 0
    return _FP32_BITS - round(-torch.tensor(torch.finfo(dtype).eps).log2().item())
