"""From finished groups to minibatches and packed micro-batches.

From groups to optimizer steps: what rank 0 collected becomes every rank's minibatches.

Every rank gets the scalars of the whole rollout batch and computes the same advantages from them;
of the tokens it gets only its own share, balanced within each minibatch and cut into the same
number of micro-batches on all ranks.

Which sequence goes where: micro-batches under a token budget, shares of equal cost for ranks.

Everything is computed from the lengths alone and deterministic, so that each rank finds the same
plan without asking the others.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_grpo.algorithm.batch import (
    Denominators,
    MicroBatch,
    RolloutBatch,
    Sequences,
    packed_rows,
    to_device,
)
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import Group

_EVENNESS = 64
"""The largest micro-batch is within this fraction of a token budget of the best that was found."""


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences so that each micro-batch holds at most `max_tokens` tokens.

    Neighbours stay together, since the sequences of a group share their prompt: each micro-batch
    takes the next sequences in order that fit. Where first-fit decreasing needs fewer micro-batches
    it is used instead. No micro-batch is larger than it must be for there to be as few: the largest
    decides how much memory a step takes. A sequence is never split: one longer than the budget gets
    a micro-batch of its own. Positions within a micro-batch ascend.

    Returns:
        Positions into `lengths`, each exactly once.
    """
    best = _fewest(lengths, max_tokens)
    low = max([-(-sum(lengths) // max(1, len(best))), *lengths], default=0) - 1
    high = max_tokens
    while high - low > max(1, max_tokens // _EVENNESS):
        middle = (low + high) // 2
        found = _fewest(lengths, middle)
        if len(found) <= len(best):
            best, high = found, middle
        else:
            low = middle
    return best


def _fewest(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    plans = (_neighbours(lengths, max_tokens), _first_fit_decreasing(lengths, max_tokens))
    return min(plans, key=len)


def _neighbours(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    left = list(range(len(lengths)))
    while left:
        taken, room = [left[0]], max_tokens - lengths[left[0]]
        for i in left[1:]:
            if lengths[i] <= room:
                taken.append(i)
                room -= lengths[i]
        bins.append(taken)
        chosen = set(taken)
        left = [i for i in left if i not in chosen]
    return bins


def _first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    free: list[int] = []
    for i in order:
        length = lengths[i]
        slot = next((b for b, room in enumerate(free) if room >= length), None)
        if slot is None:
            bins.append([i])
            free.append(max_tokens - length)
        else:
            bins[slot].append(i)
            free[slot] -= length
    return [sorted(positions) for positions in bins]


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Splits sequences over ranks so that the largest share costs as little as is easily found.

    Longest processing time first: the next largest goes to the cheapest rank so far (the one with
    fewest sequences, then the lowest, among equals). Positions within a share ascend.

    Returns:
        `num_ranks` lists of positions into `costs`, each position exactly once.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    heap: list[tuple[float, int, int]] = [(0.0, 0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, count, rank = heapq.heappop(heap)
        shares[rank].append(i)
        heapq.heappush(heap, (cost + costs[i], count + 1, rank))
    return [sorted(share) for share in shares]


def plan_ranks(
    lengths: Sequence[int], shares: Sequence[Sequence[int]], max_tokens: int
) -> list[list[list[int]]]:
    """Micro-batches of every rank, the same count on all: each is a collective under FSDP.

    A rank with too few splits its largest micro-batches; one with too few sequences gets empty
    ones, which `Sequences.select` turns into a filler that adds nothing.

    Args:
        lengths: Tokens of each sequence of the minibatch.
        shares: For each rank, its positions into `lengths` (see `balance`).
        max_tokens: Budget of a micro-batch.

    Returns:
        For each rank, its micro-batches as lists of positions into `lengths`.
    """
    plans = []
    for share in shares:
        plan = plan_micro_batches([lengths[i] for i in share], max_tokens)
        plans.append([[share[i] for i in micro_batch] for micro_batch in plan])
    count = max((len(plan) for plan in plans), default=0)
    return [_split_to(plan, count, lengths) for plan in plans]


def _split_to(plan: list[list[int]], count: int, lengths: Sequence[int]) -> list[list[int]]:
    plan = list(plan)
    while len(plan) < count:
        splittable = [p for p in range(len(plan)) if len(plan[p]) > 1]
        if not splittable:
            return plan + [[] for _ in range(count - len(plan))]
        largest = max(splittable, key=lambda p: (sum(lengths[i] for i in plan[p]), -p))
        positions = plan.pop(largest)
        halves = balance([lengths[i] for i in positions], 2)
        plan.extend([positions[i] for i in half] for half in halves)
    return plan


MinibatchPlan = list[list[int]]
"""Rows of this rank's `Sequences`, per micro-batch of one minibatch."""


class Prepared(NamedTuple):
    """What is computed of a whole rollout batch before its tokens are shared out.

    Attributes:
        advantages: `[trajectories]`, or `[tokens]` over all sequences of the batch in order.
        trained: Which trajectories have a gradient, bool `[trajectories]`.
        in_loss: Which of them the loss is divided by, bool `[trajectories]`; None: all.
        metrics: What is to be logged of it.
    """

    advantages: Tensor
    trained: Tensor
    in_loss: Tensor | None = None
    metrics: Mapping[str, float] = {}


Prepare = Callable[[RolloutBatch], Prepared]

WAITED = "time/wait_rollout_s"
"""How long the trainer has waited for a rollout batch, or for servers that it could ask."""


@dataclass
class Taken:
    """One rollout batch before it is shared out, on every rank.

    Attributes:
        index: How many rollout batches came before it.
        version: The weights that train on it.
        batch: Scalars of the whole batch, the same on every rank.
        metrics: What is known before training: rewards, lengths, staleness, the producer's counts.
        groups: The groups themselves; rank 0 only, else None.
    """

    index: int
    version: int
    batch: RolloutBatch
    metrics: dict[str, float]
    groups: list[Group] | None


@dataclass
class RankShare:
    """What one rank receives of a rollout batch's tokens.

    Attributes:
        sequences: Its tokens.
        plans: Micro-batches of each minibatch, as rows of `sequences`.
        denominators: Global denominators of each minibatch.
    """

    sequences: Sequences
    plans: list[MinibatchPlan]
    denominators: list[Denominators]


@dataclass
class Rollout(RankShare, Taken):
    """One rollout batch as one rank trains on it.

    Attributes:
        advantages: One per trajectory of the batch, `[trajectories]`, or per token, `[tokens]`.
        proximal_logprobs: Filled by the module when the loss is anchored there, `[share tokens]`.
        reference_logprobs: Filled by the module when a KL penalty asks, `[share tokens]`.
        policy_logprobs: Of each minibatch and micro-batch, by their numbers, what the policy gave
            its tokens when they were trained on first, `[tokens]`; filled in training.
    """

    advantages: Tensor
    proximal_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    policy_logprobs: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass
class Minibatch:
    """One optimizer step: some groups of a rollout batch, as packed micro-batches.

    Attributes:
        rollout: What it is part of.
        index: Which minibatch of the pass.
        pass_index: Which pass over the rollout batch.
        is_first: Whether it is the first step on this rollout batch.
        is_last: Whether it is the last one: the weights are published after it.
    """

    rollout: Rollout
    index: int
    pass_index: int
    is_first: bool
    is_last: bool

    @property
    def num_micro_batches(self) -> int:
        """How many forward and backward passes it takes; equal on all ranks."""
        return len(self.rollout.plans[self.index])

    def micro_batch(self, k: int, device: torch.device | str = "cpu") -> MicroBatch:
        """The k-th micro-batch with its advantages and anchors, on `device`."""
        rollout = self.rollout
        rows, denominators = rollout.plans[self.index][k], rollout.denominators[self.index]
        return on_device(assemble(rollout, rows, denominators), device)


def assemble(rollout: Rollout, rows: list[int], denominators: Denominators) -> MicroBatch:
    """Pack `rows` of this rank's share with everything that the loss may read."""
    batch = MicroBatch.from_sequences(
        rollout.sequences.select(rows), rollout.batch, rollout.advantages, denominators
    )
    return replace(
        batch,
        proximal_logprobs=_rows(rollout.proximal_logprobs, rollout.sequences, rows),
        reference_logprobs=_rows(rollout.reference_logprobs, rollout.sequences, rows),
    )


def on_device(batch: MicroBatch, device: torch.device | str) -> MicroBatch:
    """The same micro-batch with its tensors on `device`."""
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved: dict[str, Any] = {
        n: to_device(t, device) for n, t in values.items() if isinstance(t, Tensor)
    }
    return replace(batch, **moved)


def token_rows(sequences: Sequences, rows: list[int]) -> Tensor:
    """Positions in `sequences` of the tokens of `rows`, in that order, int64 `[tokens]`."""
    return packed_rows(sequences.cu_seqlens, torch.tensor(rows, dtype=torch.int64))


def policy_logprobs(rollout: Rollout) -> dict[int, np.ndarray]:
    """What the policy gave the tokens of this rank's share when they were trained on first.

    Returns:
        fp32 `[tokens]` of each trajectory that was trained on, by its number in the rollout batch.
        Entry 0 says nothing, nor do those of tokens outside the loss.
    """
    found: dict[int, np.ndarray] = {}
    for (index, k), logprobs in rollout.policy_logprobs.items():
        rows = rollout.plans[index][k]
        numbers = rollout.sequences.trajectory_index[rows].tolist()
        ends = rollout.sequences.lengths[rows].cumsum(0)[:-1].tolist()
        found |= zip(numbers, np.split(logprobs.float().cpu().numpy(), ends), strict=True)
    return found


def _rows(values: Tensor | None, sequences: Sequences, rows: list[int]) -> Tensor | None:
    if values is None:
        return None
    # A filler (no rows) has two tokens outside every mask.
    return values[token_rows(sequences, rows)] if rows else torch.zeros(2)


class RolloutSource(Protocol):
    """Where rollout batches come from: the live session, or recorded trajectories."""

    def take(self) -> Taken:
        """The next rollout batch; on ranks other than 0 without groups."""
        ...

    def share(self, parts: list[Any] | None) -> Any:
        """Rank r's element of what rank 0 passes."""
        ...


@dataclass(frozen=True)
class Shape:
    """How a rollout batch is cut.

    Attributes:
        minibatches: Optimizer steps of one pass.
        passes: Passes over the rollout batch.
        max_tokens: Token budget of a micro-batch.
        num_ranks: All ranks.
        row_ranks: Of these, neighbours that compute each row together: they get the same tokens.
    """

    minibatches: int
    passes: int
    max_tokens: int
    num_ranks: int = 1
    row_ranks: int = 1

    @property
    def shares(self) -> int:
        """Into how many parts the tokens are cut."""
        return self.num_ranks // self.row_ranks

    @property
    def steps(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.minibatches * self.passes


class RolloutLoader:
    """A sized, resumable loader of minibatches; Lightning fetches no batch ahead of a sized one.

    Args:
        source: Gives rollout batches.
        prepare: Computes advantages and says which trajectories carry a gradient.
        shape: How a rollout batch is cut.
        num_batches: Nominal length of an epoch, in rollout batches.
    """

    def __init__(
        self, source: RolloutSource, prepare: Prepare, shape: Shape, num_batches: int
    ) -> None:
        self._source = source
        self._prepare = prepare
        self._shape = shape
        self._num_batches = num_batches

    def __len__(self) -> int:
        """Optimizer steps of a nominal epoch."""
        return self._num_batches * self._shape.steps

    def __iter__(self) -> Iterator[Minibatch]:
        """Minibatches without end: the prompt stream joins its passes, Lightning counts epochs."""
        while True:
            yield from minibatches(self.next_rollout(), self._shape)

    def next_rollout(self) -> Rollout:
        """Take one rollout batch and cut this rank's share of it.

        Consumes a `Taken`; waits for it, then for this rank's share of the tokens. Produces the
        rollout with advantages and micro-batches planned. The Trainer goes on, with the first of
        its minibatches.
        """
        started = time.perf_counter()
        taken = self._source.take()
        waited_s = time.perf_counter() - started + taken.metrics.get(WAITED, 0.0)
        prepared = self._prepare(taken.batch)
        taken.metrics = {**taken.metrics, WAITED: waited_s, **prepared.metrics}
        parts = None
        if taken.groups is not None:
            parts = split(taken, prepared, self._shape)
        share: RankShare = self._source.share(parts)
        advantages = trainable(prepared.advantages, taken.batch)
        return Rollout(**vars(taken), **vars(share), advantages=advantages)

    # Lightning warns about loaders without state; ours lives in the data module's checkpoint entry.
    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module holds the rollout state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore here."""


def trainable(advantages: Tensor, batch: RolloutBatch) -> Tensor:
    """Advantages in fp32, as losses are computed.

    Raises:
        ConfigError: One of them is no number there: it would break every weight.
    """
    single = advantages.float()
    wrong = (~single.isfinite()).nonzero()
    if len(wrong):
        place = int(wrong[0])
        found = f"got {float(advantages[place])}"
        if len(advantages) == len(batch):
            group = batch.rewards[batch.group_ids == batch.group_ids[place]].tolist()
            found += f" for a trajectory of prompt {batch.keys[place]}, with the rewards {group}"
        raise ConfigError(
            f"advantages must be finite in fp32, {found}. Mend what computes them: the rewards, "
            "`shape_rewards` or `advantages` of the module."
        )
    return single


def minibatches(rollout: Rollout, shape: Shape) -> Iterator[Minibatch]:
    """Every optimizer step on one rollout batch, in order."""
    for pass_index in range(shape.passes):
        for index in range(shape.minibatches):
            step = pass_index * shape.minibatches + index
            yield Minibatch(rollout, index, pass_index, step == 0, step == shape.steps - 1)


def split(taken: Taken, prepared: Prepared, shape: Shape) -> list[RankShare]:
    """Cut a rollout batch into minibatches, ranks and micro-batches (rank 0 only).

    Trajectories without a gradient stay out of the forward pass but count in the denominators, so
    that the loss is the same as with them; those that are not in the loss count nowhere.

    Args:
        taken: The batch, with its groups.
        prepared: Which trajectories carry a gradient, which are in the loss.
        shape: How to cut.
    """
    groups = taken.groups or []
    trajectories = [t for g in groups for t in g.trajectories]
    whole = Sequences.from_trajectories(trajectories, range(len(trajectories)))
    lengths = whole.lengths.tolist()
    rank_plans: list[list[MinibatchPlan]] = [[] for _ in range(shape.shares)]
    denominators = []
    in_loss = torch.ones_like(prepared.trained) if prepared.in_loss is None else prepared.in_loss
    for first, last in _minibatch_bounds(groups, shape.minibatches):
        rows = [i for i in range(first, last) if prepared.trained[i]]
        row_lengths = [lengths[i] for i in rows]
        shares = balance(row_lengths, shape.shares)
        plans = plan_ranks(row_lengths, shares, shape.max_tokens)
        for rank, plan in enumerate(plans):
            # Every rank joins every reduction: one without a sequence has an empty micro-batch.
            rank_plans[rank].append([[rows[j] for j in micro] for micro in plan or [[]]])
        counted = [i for i in range(first, last) if in_loss[i]]
        denominators.append(taken.batch.denominators(counted))
    shared = [_rank_share(whole, plans, denominators) for plans in rank_plans]
    return [share for share in shared for _ in range(shape.row_ranks)]


def _minibatch_bounds(groups: list[Group], minibatches: int) -> list[tuple[int, int]]:
    """First and last (exclusive) trajectory of each minibatch: whole groups, in order."""
    # A recording's batches need not divide evenly: no group may be lost.
    bounds = [len(groups) * m // minibatches for m in range(minibatches + 1)]
    starts = [0, *itertools.accumulate(len(g.trajectories) for g in groups)]
    return [(starts[first], starts[last]) for first, last in itertools.pairwise(bounds)]


def _rank_share(
    whole: Sequences, plans: list[MinibatchPlan], denominators: list[Denominators]
) -> RankShare:
    rows = [i for plan in plans for micro in plan for i in micro]
    local = {row: k for k, row in enumerate(rows)}
    return RankShare(
        sequences=whole.select(rows),
        plans=[[[local[i] for i in micro] for micro in plan] for plan in plans],
        denominators=denominators,
    )
