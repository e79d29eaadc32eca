"""A rank's share of the tokens of a rollout batch, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.algorithm.layout import packed_rows
from lightning_grpo.types import NO_VERSION, Trajectory


@dataclass(frozen=True)
class Sequences:
    """Tokens of some trajectories, packed end to end without padding.

    Attributes:
        input_ids: int64 `[tokens]`.
        cu_seqlens: Where each sequence starts, and the end, int64 `[sequences + 1]`.
        response_mask: The policy sampled this token, bool `[tokens]`.
        loss_mask: It enters the loss, bool `[tokens]`; a subset of `response_mask`.
        behavior_logprobs: Under the policy that sampled; 0 outside, fp32 `[tokens]`.
        weight_versions: Weights that sampled the token, int64 `[tokens]`.
        trajectory_index: Row in the `RolloutBatch`, int64 `[sequences]`.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    weight_versions: Tensor
    trajectory_index: Tensor

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.trajectory_index)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int64 `[sequences]`."""
        return self.cu_seqlens.diff()

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @classmethod
    def from_trajectories(
        cls, trajectories: Sequence[Trajectory], index: Sequence[int]
    ) -> Sequences:
        """Packs trajectories; `index` holds the row of each in the `RolloutBatch`."""
        lengths = [0, *(len(t.input_ids) for t in trajectories)]
        mask = _pack([t.response_mask for t in trajectories], torch.bool)
        # The first token of a sequence has no probability, so it can't enter the loss.
        loss_mask = mask.clone()
        starts = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        loss_mask[starts[:-1][starts.diff() > 0]] = False
        return cls(
            input_ids=_pack([t.input_ids for t in trajectories], torch.int64),
            cu_seqlens=starts,
            response_mask=mask,
            loss_mask=loss_mask,
            behavior_logprobs=_pack([t.logprobs for t in trajectories], torch.float32),
            weight_versions=_pack([t.versions for t in trajectories], torch.int64),
            trajectory_index=torch.tensor(list(index), dtype=torch.int64),
        )

    @classmethod
    def filler(cls) -> Sequences:
        """One sequence that adds nothing: for a rank that has fewer micro-batches than others."""
        nothing = torch.zeros(2, dtype=torch.bool)
        return cls(
            input_ids=torch.zeros(2, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 2]),
            response_mask=nothing,
            loss_mask=nothing.clone(),
            behavior_logprobs=torch.zeros(2),
            weight_versions=torch.full((2,), NO_VERSION),
            trajectory_index=torch.zeros(1, dtype=torch.int64),
        )

    def select(self, rows: Sequence[int]) -> Sequences:
        """The sequences at positions `rows`, in that order, as tensors of their own.

        Copies, so that what is pickled to another rank is only as large as the selection. No
        rows at all give `filler()`.
        """
        if len(rows) == 0:
            return self.filler().to(self.input_ids.device)
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.cu_seqlens.device)
        tokens = packed_rows(self.cu_seqlens, index)
        starts = torch.zeros(len(index) + 1, dtype=torch.int64, device=index.device)
        starts[1:] = self.lengths[index].cumsum(0)
        return Sequences(
            input_ids=self.input_ids[tokens],
            cu_seqlens=starts,
            response_mask=self.response_mask[tokens],
            loss_mask=self.loss_mask[tokens],
            behavior_logprobs=self.behavior_logprobs[tokens],
            weight_versions=self.weight_versions[tokens],
            trajectory_index=self.trajectory_index[index],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sequences:
        """The same on another device."""
        return Sequences(
            **{
                f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
                for f in fields(self)
            }
        )


def _pack(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)
