"""Which sequence goes where: micro-batches under a token budget, shares of equal cost for ranks.

Everything is computed from the lengths alone and deterministic, so that each rank finds the same
plan without asking the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups sequences so that each micro-batch holds at most `max_tokens` tokens.

    First-fit decreasing. A sequence is never split: one longer than the budget gets a micro-batch
    of its own. Positions within a micro-batch ascend.

    Returns:
        Positions into `lengths`, each exactly once.
    """
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
