"""The trainer's side of a proof: what it gives the probe's tokens itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightning_grpo.strategies.parallelize import reshard, unshard
from lightning_grpo.weights.probe import require_finite


@torch.no_grad()
def own_scores(policy: nn.Module, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Logprobs of each sequence, by the pass that trains; on every rank, as shards need all.

    Every server waits for it, and what it costs is the CPU's time to launch it.

    Args:
        policy: A `PackedPolicy`, sharded or not.
        sequences: Token ids.

    Returns:
        `[sequences][tokens]`; entry 0 of a sequence says nothing.
    """
    device = next(policy.parameters()).device
    unshard(policy)
    scores = []
    for ids in sequences:
        logprobs, _ = policy(torch.tensor(ids).to(device, non_blocking=True))
        scores.append(logprobs.float().tolist())
    reshard(policy)  # the optimizer and callbacks look at the shards
    require_finite(scores)
    return scores
