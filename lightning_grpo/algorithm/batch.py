"""The batch as tensors: the packed layout, a share of the tokens, and the records of it.

The records of a batch: the scalars of all of it, and what a loss receives of its tokens.

One layout: packed `[tokens]` with `cu_seqlens [sequences + 1]`. Entry t of every per-token tensor
is about token t: `logprobs[t] = log p(token_t | tokens before t)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_grpo.types import NO_VERSION, Group, PromptKey, Trajectory

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus or minus this: exp(20) is 5e8, beyond any use."""


def sequence_ids(cu_seqlens: Tensor) -> Tensor:
    """Which sequence each token belongs to, int64 `[tokens]`."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, without a wait for what a GPU computes meanwhile."""
    device = torch.device(device)
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


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
        routes: The experts that servers chose, uint8 or int16 `[tokens, layers, top_k]`, all bits
            set where nobody knows; None: nobody asked.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    weight_versions: Tensor
    trajectory_index: Tensor
    routes: Tensor | None = None

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
        mask = _pack([t.response_mask for t in trajectories], np.bool_)
        # The first token of a sequence has no probability, so it can't enter the loss.
        loss_mask = mask.clone()
        starts = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        loss_mask[starts[:-1][starts.diff() > 0]] = False
        return cls(
            input_ids=_pack([t.input_ids for t in trajectories], np.int64),
            cu_seqlens=starts,
            response_mask=mask,
            loss_mask=loss_mask,
            behavior_logprobs=_pack([t.logprobs for t in trajectories], np.float32),
            weight_versions=_pack([t.versions for t in trajectories], np.int64),
            trajectory_index=torch.tensor(list(index), dtype=torch.int64),
            routes=_pack_routes(trajectories),
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
            filler = self.filler()
            if self.routes is not None:  # each micro-batch counts what it replays
                unknown = torch.full((2, *self.routes.shape[1:]), -1).to(self.routes.dtype)
                filler = replace(filler, routes=unknown)
            return filler.to(self.input_ids.device)
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
            routes=None if self.routes is None else self.routes[tokens],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sequences:
        """The same on another device."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, each in held.items():
            held[name] = None if each is None else each.to(device, non_blocking=non_blocking)
        return Sequences(**held)


def _pack(rows: Sequence[Sequence[Any]], dtype: type[np.generic]) -> Tensor:
    # A fifth of what torch.tensor takes of a list: the trainer's GPU waits for it.
    values = np.fromiter(chain.from_iterable(rows), dtype, sum(map(len, rows)))
    return torch.from_numpy(values)


def _pack_routes(trajectories: Sequence[Trajectory]) -> Tensor | None:
    """Of all their tokens, where one of them has any."""
    shape = next((t.routes.shape for t in trajectories if t.routes is not None), None)
    if shape is None:
        return None
    num_tokens = sum(len(t.input_ids) for t in trajectories)
    rows = np.full((num_tokens, shape.row_bytes), 255, np.uint8)
    start = 0
    for each in trajectories:
        if each.routes is not None:
            known = np.frombuffer(each.routes.experts, np.uint8).reshape(-1, shape.row_bytes)
            rows[start : start + len(known)] = known[: len(each.input_ids)]
        start += len(each.input_ids)
    values = rows.view(np.uint8 if shape.width == 1 else np.dtype("<i2"))
    return torch.from_numpy(values).view(num_tokens, shape.layers, shape.top_k)


__all__ = ["Denominators", "MicroBatch", "RolloutBatch", "Sequences"]


@dataclass(frozen=True, slots=True)
class Denominators:
    """What a minibatch's loss is divided by, counted over all ranks.

    Args:
        tokens: Tokens in `loss_mask`.
        sequences: Trajectories, those without a token in `loss_mask` included.
        groups: Prompts.
    """

    tokens: int
    sequences: int
    groups: int


@dataclass(frozen=True)
class RolloutBatch:
    """The scalars of a whole rollout batch; the same on each rank, whole groups in order.

    Attributes:
        group_ids: Which group a trajectory belongs to, 0 .. groups - 1, int64 `[trajectories]`.
        rewards: What is trained on, fp64 `[trajectories]`: rewards of 1e8 and 1e8 + 1 differ.
        rewards_by_name: Each reward before weighting, fp64 `[trajectories]`; NaN where a
            trajectory has none of that name.
        response_lengths: Sampled tokens, int64 `[trajectories]`.
        loss_lengths: Those of them in `loss_mask`, int64 `[trajectories]`.
        sequence_lengths: All tokens, int64 `[trajectories]`.
        last_lengths: Tokens of its last completion, int64 `[trajectories]`.
        length_limits: The most that one could have; 0 where nobody said it, int64 `[trajectories]`.
        truncated: Whether the length limit ended it, bool `[trajectories]`.
        oldest_versions: Oldest weights that sampled a token of it, int64 `[trajectories]`.
        newest_versions: Newest such weights, int64 `[trajectories]`.
        temperatures: What the logits were divided by, fp32 `[trajectories]`.
        keys: The prompt of each trajectory, `[trajectories]`.
        columns: The columns of that prompt's row, `[trajectories]`.
        datasets: The name of that prompt's dataset, where there are several, `[trajectories]`.
        version: The weight version that will train on the batch.
        batch_index: How many rollout batches were taken before this one.
    """

    group_ids: Tensor
    rewards: Tensor
    rewards_by_name: dict[str, Tensor]
    response_lengths: Tensor
    loss_lengths: Tensor
    sequence_lengths: Tensor
    last_lengths: Tensor
    length_limits: Tensor
    truncated: Tensor
    oldest_versions: Tensor
    newest_versions: Tensor
    temperatures: Tensor
    keys: list[PromptKey]
    columns: list[Mapping[str, Any]]
    datasets: list[str]
    version: int
    batch_index: int = 0

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self.keys)

    @property
    def num_groups(self) -> int:
        """Number of prompts."""
        return len(set(self.group_ids.tolist()))

    @classmethod
    def from_groups(
        cls, groups: Sequence[Group], version: int, batch_index: int = 0
    ) -> RolloutBatch:
        """Collects the scalars of whole groups, in the order given."""
        pairs = [(g, i, t) for i, g in enumerate(groups) for t in g.trajectories]
        trajectories = [t for _, _, t in pairs]
        names = sorted({name for t in trajectories for name in t.rewards})
        return cls(
            group_ids=torch.tensor([i for _, i, _ in pairs], dtype=torch.int64),
            rewards=_doubles(trajectories, lambda t: t.reward),
            rewards_by_name={
                name: _doubles(trajectories, lambda t, n=name: t.rewards.get(n, float("nan")))  # type: ignore[misc]
                for name in names
            },
            response_lengths=_integers(trajectories, lambda t: t.num_response_tokens),
            loss_lengths=_integers(trajectories, lambda t: t.response_mask[1:].count(True)),
            sequence_lengths=_integers(trajectories, lambda t: len(t.input_ids)),
            last_lengths=_integers(trajectories, lambda t: t.num_last_tokens),
            length_limits=_integers(trajectories, lambda t: t.length_limit or 0),
            truncated=torch.tensor([t.truncated for t in trajectories], dtype=torch.bool),
            oldest_versions=_integers(trajectories, lambda t: t.oldest_version),
            newest_versions=_integers(
                trajectories, lambda t: max(set(t.versions), default=NO_VERSION)
            ),
            temperatures=_doubles(trajectories, lambda t: t.temperature).float(),
            keys=[g.prompt.key for g, _, _ in pairs],
            columns=[g.prompt.columns for g, _, _ in pairs],
            datasets=[g.prompt.dataset for g, _, _ in pairs],
            version=version,
            batch_index=batch_index,
        )

    def denominators(self, rows: Sequence[int] | None = None) -> Denominators:
        """Counts over the minibatch that consists of `rows` on all ranks (None: all rows)."""
        index = torch.arange(len(self)) if rows is None else torch.tensor(list(rows)).long()
        return Denominators(
            tokens=int(self.loss_lengths[index].sum()),
            sequences=len(index),
            groups=len(set(self.group_ids[index].tolist())),
        )


def _doubles(trajectories: Sequence[Trajectory], read: Callable[[Trajectory], float]) -> Tensor:
    return torch.tensor([read(t) for t in trajectories], dtype=torch.float64)


def _integers(trajectories: Sequence[Trajectory], read: Callable[[Trajectory], int]) -> Tensor:
    return torch.tensor([read(t) for t in trajectories], dtype=torch.int64)


def _per_token(values: Tensor, rollout: RolloutBatch, sequences: Sequences) -> Tensor:
    index = sequences.trajectory_index
    values = values.to(index.device)
    if len(values) == len(rollout):
        return expand(values[index], sequences.cu_seqlens)
    bounds = torch.zeros(len(rollout) + 1, dtype=torch.int64)
    bounds[1:] = rollout.sequence_lengths.cpu().cumsum(0)
    if len(values) != int(bounds[-1]):
        raise ValueError(
            f"`advantages` must be [trajectories] = {len(rollout)} or [tokens] = {int(bounds[-1])}"
            f" of the rollout batch, got {len(values)}."
        )
    starts = expand(bounds.to(index.device)[index], sequences.cu_seqlens)
    return values[starts + token_positions(sequences.cu_seqlens)]


@dataclass(frozen=True)
class MicroBatch:
    """What a loss receives; all per-token tensors are `[tokens]`.

    Attributes:
        input_ids: int64.
        cu_seqlens: int64 `[sequences + 1]`.
        response_mask: The policy sampled this token, bool.
        loss_mask: It enters the loss, bool.
        behavior_logprobs: Under the policy that sampled the token.
        weight_versions: Weights that sampled the token, int64.
        advantages: Per token.
        temperature: What the logits are divided by.
        trajectory_index: Row in the `RolloutBatch`, int64 `[sequences]`.
        denominators: Global counts of the minibatch.
        proximal_logprobs: The anchor of the clip. None means the policy itself, detached (one
            optimizer step on the batch); `minibatch_loss` fills it in before a loss sees it.
        reference_logprobs: Under the reference policy, where a KL penalty asks for them.
        entropy: Of the policy at each token, where asked for.
        policy_logprobs: The policy being trained, detached; `minibatch_loss` fills it in.
        routes: The experts that servers chose, as `Sequences` has them, where the router is
            replayed.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    weight_versions: Tensor
    advantages: Tensor
    temperature: Tensor
    trajectory_index: Tensor
    denominators: Denominators
    proximal_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    policy_logprobs: Tensor | None = None
    routes: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequences,
        rollout: RolloutBatch,
        advantages: Tensor,
        denominators: Denominators,
    ) -> MicroBatch:
        """Adds to packed tokens what was computed on the whole rollout batch.

        Args:
            sequences: The tokens.
            rollout: The rollout batch.
            advantages: Of the whole rollout batch, `[trajectories]`, or `[tokens]` of all its
                trajectories end to end.
            denominators: Global counts of the minibatch.
        """
        index = sequences.trajectory_index
        return cls(
            input_ids=sequences.input_ids,
            cu_seqlens=sequences.cu_seqlens,
            response_mask=sequences.response_mask,
            loss_mask=sequences.loss_mask,
            behavior_logprobs=sequences.behavior_logprobs,
            weight_versions=sequences.weight_versions,
            advantages=_per_token(advantages, rollout, sequences),
            temperature=_per_token(rollout.temperatures, rollout, sequences),
            trajectory_index=index,
            denominators=denominators,
            routes=sequences.routes,
        )

    def with_proximal(self, policy_logprobs: Tensor) -> MicroBatch:
        """Fills in the policy, and the anchor of the clip where there is none yet."""
        policy = policy_logprobs.detach()
        proximal = policy if self.proximal_logprobs is None else self.proximal_logprobs
        return replace(self, proximal_logprobs=proximal, policy_logprobs=policy)
