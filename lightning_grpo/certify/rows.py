"""Rows of tokens that show how a model computes, and what transformers says of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_grpo.certify.tiny import VOCAB
from lightning_grpo.policy.attention import length_switches

LENGTHS = (1, 2, 9, 23, 33, 47, 60)
"""On both sides of the windows, and of the lengths at which RoPE switches, of a tiny model."""
_GROUPS = ((21, (5, 14, 30)), (3, (2, 40)), (9, (0, 0, 6)))
"""Length of a prompt, and of what follows it in each row."""
_SPECIAL = 3
"""Ids below mean something: padding, begin, end."""


def rows_of(config: Any, seed: int = 0) -> list[Tensor]:
    """Random rows of very different lengths, int64 `[tokens]` each.

    Args:
        config: Of a tiny model; lengths at which it switches are there, and one more.
        seed: Of the tokens.
    """
    switches = [n + more for n in length_switches(config) for more in (0, 1)]
    ordered = sorted({*LENGTHS, *(n for n in switches if n <= max(LENGTHS))})
    mixed = [n for pair in zip(ordered, reversed(ordered), strict=True) for n in pair]
    generator = torch.Generator().manual_seed(seed)
    return [random_ids(n, generator) for n in mixed[: len(ordered)]]


def rows_with_prompts(seed: int = 0) -> list[Tensor]:
    """Groups of rows that begin alike: by more than a window, by little, by all of a row."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for prompt, rests in _GROUPS:
        shared = random_ids(prompt, generator)
        rows += [torch.cat([shared, random_ids(n, generator)]) for n in rests]
    return rows


def random_ids(length: int, generator: torch.Generator) -> Tensor:
    """Ids of no special meaning, int64 `[length]`."""
    return torch.randint(_SPECIAL, VOCAB, (length,), generator=generator)


def pack(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`input_ids [tokens]` and `cu_seqlens [rows + 1]`."""
    return torch.cat(list(rows)), torch.tensor([0, *map(len, rows)]).cumsum(0)


def plain_logprobs(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """What transformers' own forward gives each row alone, `[tokens]`, laid out as the policy's."""
    found: dict[int, Tensor] = {}
    # In rising length: RoPE that depends on it remembers the longest row that it has seen.
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        logits = model(rows[index].unsqueeze(0), use_cache=False).logits[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        taken = wide[:-1].gather(1, rows[index][1:].unsqueeze(1)).squeeze(1)
        found[index] = torch.cat([wide.new_zeros(1), taken])
    return torch.cat([found[index] for index in range(len(rows))])


@torch.no_grad()
def policy_logprobs(policy: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """What a policy gives the rows, packed, `[tokens]`."""
    logprobs: Tensor = policy(*pack(rows))[0]
    return logprobs
