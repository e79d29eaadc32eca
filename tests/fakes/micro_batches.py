"""Micro-batches with random contents, from nothing but lengths and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_grpo.algorithm.batch import Denominators, MicroBatch, expand, packed_rows


def make_micro_batch(
    lengths: Sequence[tuple[int, int]],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    spread: float = 0.3,
) -> tuple[Tensor, MicroBatch]:
    """Policy logprobs `[tokens]` (a leaf) and a whole minibatch.

    Args:
        lengths: (prompt tokens, response tokens) of each sequence.
        seed: Of everything random.
        dtype: Of everything real.
        spread: Of the log-ratios between the policies.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(total, generator=generator, dtype=torch.float64)

    totals = [prompt + response for prompt, response in lengths]
    total = sum(totals)
    cu_seqlens = torch.tensor([0, *totals]).cumsum(0)
    mask = torch.cat([torch.arange(p + r) >= p for p, r in lengths])
    policy = -0.1 - noise().abs()
    reals = {
        "behavior_logprobs": policy + noise(spread),
        "proximal_logprobs": policy + noise(spread),
        "reference_logprobs": policy + noise(spread),
        "advantages": expand(noise()[: len(lengths)], cu_seqlens),
        "entropy": noise().abs(),
        "temperature": torch.ones(total, dtype=torch.float64),
    }
    batch = MicroBatch(
        input_ids=torch.randint(0, 50, (total,), generator=generator),
        cu_seqlens=cu_seqlens,
        response_mask=mask,
        loss_mask=mask & (torch.rand(total, generator=generator) < 0.9),
        weight_versions=torch.where(
            mask, torch.randint(3, 6, (total,), generator=generator), torch.tensor(-1)
        ),
        trajectory_index=torch.arange(len(lengths)),
        denominators=Denominators(1, 1, 1),
        **{name: value.to(dtype) for name, value in reals.items()},
    )
    counts = Denominators(int(batch.loss_mask.sum()), len(lengths), len(lengths))
    return policy.to(dtype).requires_grad_(), replace(batch, denominators=counts)


PER_TOKEN = (
    "input_ids",
    "response_mask",
    "loss_mask",
    "behavior_logprobs",
    "proximal_logprobs",
    "reference_logprobs",
    "weight_versions",
    "advantages",
    "entropy",
    "temperature",
)


def select_sequences(batch: MicroBatch, rows: Sequence[int]) -> tuple[Tensor, MicroBatch]:
    """Positions of the tokens of some sequences, and a micro-batch of them alone."""
    index = torch.tensor(list(rows))
    tokens = packed_rows(batch.cu_seqlens, index)
    lengths = batch.cu_seqlens.diff()[index]
    picked = {
        name: None if (value := vars(batch)[name]) is None else value[tokens] for name in PER_TOKEN
    }
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return tokens, replace(
        batch, cu_seqlens=starts, trajectory_index=batch.trajectory_index[index], **picked
    )
