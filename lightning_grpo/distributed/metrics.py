"""Metrics that know how they reduce, over all ranks."""

from __future__ import annotations

import torch
from torch import distributed

from lightning_grpo.algorithm.metrics import Metrics, from_tensors, to_tensors


def reduced(metrics: Metrics, device: torch.device) -> Metrics:
    """The same metrics over all ranks: two all-reduces; every rank has the same names."""
    sums, maxima = to_tensors(metrics, device)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
        distributed.all_reduce(maxima, op=distributed.ReduceOp.MAX)
    return from_tensors(metrics, sums, maxima)
