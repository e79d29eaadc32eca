"""From groups to minibatches: whatever the split, the same loss and the same gradient."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from lightning_grpo.algorithm.advantages import GroupAdvantage
from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.algorithm.corrections import SequenceTIS, TokenTIS
from lightning_grpo.algorithm.losses import (
    ConstantLength,
    GRPOLoss,
    GSPOLoss,
    SequenceMean,
    TokenMean,
)
from lightning_grpo.errors import ConfigError
from lightning_grpo.loader import (
    WAITED,
    Minibatch,
    Prepared,
    Rollout,
    RolloutLoader,
    Shape,
    Taken,
    balance,
    minibatches,
    plan_micro_batches,
    plan_ranks,
    split,
    trainable,
)
from lightning_grpo.objective import Objective
from lightning_grpo.types import NO_VERSION, Group, Prompt, Trajectory

VOCAB = 11


class Bigrams(nn.Module):
    """A policy whose token depends on the one before it in the same sequence."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        noise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(noise.to(dtype))

    def forward(self, input_ids, cu_seqlens, temperature, with_entropy=False, positions_mask=None):
        before = torch.roll(input_ids, 1)
        distributions = (self.table[before] / temperature[:, None]).log_softmax(-1)
        logprobs = distributions.gather(1, input_ids[:, None])[:, 0]
        first = torch.zeros_like(input_ids, dtype=torch.bool)
        first[cu_seqlens[:-1]] = True
        entropy = -(distributions.exp() * distributions).sum(-1)
        return torch.where(first, 0.0, logprobs), entropy if with_entropy else None


def make_groups(lengths: list[list[tuple[int, int]]], seed: int) -> list[Group]:
    """Groups with (prompt, response) lengths of each trajectory, all else random."""
    noise = torch.Generator().manual_seed(seed)

    def numbers(count: int) -> list[float]:
        return torch.rand(count, generator=noise).tolist()

    groups = []
    for row, members in enumerate(lengths):
        trajectories = []
        for prompt, response in members:
            ids = torch.randint(0, VOCAB, (prompt + response,), generator=noise).tolist()
            reward = numbers(1)[0]
            trajectories.append(
                Trajectory(
                    input_ids=tuple(ids),
                    response_mask=(False,) * prompt + (True,) * response,
                    logprobs=(0.0,) * prompt + tuple(-3 * x for x in numbers(response)),
                    versions=(NO_VERSION,) * prompt + (0,) * response,
                    reward=reward,
                    rewards={"right": reward},
                    text="",
                    truncated=False,
                    temperature=0.7,
                )
            )
        groups.append(Group(Prompt((1,), "", row=row), tuple(trajectories), 0))
    return groups


def shares(groups: list[Group], shape: Shape, trained: torch.Tensor | None = None) -> list[Rollout]:
    """Each rank's rollout."""
    batch = RolloutBatch.from_groups(groups, version=0)
    advantages = GroupAdvantage()(batch.rewards, batch.group_ids)
    if trained is None:
        trained = torch.ones(len(batch), dtype=torch.bool)
    prepared = Prepared(advantages, trained)
    parts = split(Taken(0, 0, batch, {}, groups), prepared, shape)
    taken = vars(Taken(0, 0, batch, {}, None))
    return [Rollout(**taken, **vars(part), advantages=advantages) for part in parts]


def losses_and_gradients(
    rollouts: list[Rollout], shape: Shape, objective: Objective, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per minibatch: what all micro-batches of all ranks add up to."""
    policy, results = Bigrams(dtype), []
    cpu = torch.device("cpu")
    for rollout in rollouts:
        objective.anchor(policy, rollout, shape.steps, cpu)
    for index in range(shape.minibatches):
        total, policy.table.grad = torch.zeros((), dtype=dtype), None
        for rollout in rollouts:
            minibatch = Minibatch(rollout, index, 0, is_first=False, is_last=False)
            for k in range(minibatch.num_micro_batches):
                loss, _ = objective.micro_batch_loss(policy, minibatch, k, cpu)
                loss.backward()
                total += loss.detach()
        results.append((total, policy.table.grad.clone()))
    return results


OBJECTIVES = [
    Objective(GRPOLoss()),
    Objective(GRPOLoss(aggregation=SequenceMean()), entropy_coefficient=0.1),
    Objective(GRPOLoss(aggregation=ConstantLength(9)), correction=TokenTIS()),
    Objective(GRPOLoss(aggregation=TokenMean()), correction=SequenceTIS()),
    Objective(GSPOLoss(clip_low=0.1, clip_high=0.1)),
]
LENGTHS = st.lists(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=2, max_size=4),
    min_size=4,
    max_size=8,
).filter(lambda groups: len(groups) % 2 == 0)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=LENGTHS,
    ranks=st.integers(1, 5),
    minibatches=st.sampled_from([1, 2]),
    max_tokens=st.integers(4, 80),
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 99),
)
def test_any_split_over_ranks_and_micro_batches_adds_up_to_the_same_loss_and_gradient(
    dtype, limit, lengths, ranks, minibatches, max_tokens, objective, seed
):
    groups = make_groups(lengths, seed)
    whole = Shape(minibatches, 2, max_tokens=10**6)
    cut = Shape(minibatches, 2, max_tokens, ranks)
    expected = losses_and_gradients(shares(groups, whole), whole, objective, dtype)
    got = losses_and_gradients(shares(groups, cut), cut, objective, dtype)
    for (loss, gradient), (whole_loss, whole_gradient) in zip(got, expected, strict=True):
        assert abs(float(loss - whole_loss)) <= limit * max(1.0, abs(float(whole_loss)))
        difference = float((gradient - whole_gradient).norm())
        assert difference <= limit * max(1.0, float(whole_gradient.norm()))


@pytest.mark.parametrize("ranks", [1, 3])
def test_trajectories_without_a_gradient_cost_no_pass_and_change_no_gradient(ranks):
    groups = make_groups([[(2, 5), (3, 4), (1, 6)]] * 6, seed=1)
    batch = RolloutBatch.from_groups(groups, version=0)
    trained = torch.arange(len(batch)) % 3 != 0
    shape = Shape(2, 1, max_tokens=20, num_ranks=ranks)
    left_out, everything = shares(groups, shape, trained), shares(groups, shape)
    for rollout in [*left_out, *everything]:
        rollout.advantages = torch.where(trained, rollout.advantages, 0.0)
    objective = Objective(GRPOLoss())
    fewer = losses_and_gradients(left_out, shape, objective, torch.float64)
    all_of_them = losses_and_gradients(everything, shape, objective, torch.float64)
    for (_, gradient), (_, expected) in zip(fewer, all_of_them, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-12)
    assert sum(len(r.sequences) for r in left_out) == int(trained.sum())
    assert left_out[0].denominators == everything[0].denominators


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), ConstantLength(9)])
def test_what_is_not_in_the_loss_counts_nowhere(aggregation):
    groups = make_groups([[(2, 5), (3, 4), (1, 6)]] * 2, seed=1)
    fewer = [replace(g, trajectories=g.trajectories[:2]) for g in groups]
    shape, objective = Shape(1, 1, max_tokens=20), Objective(GRPOLoss(aggregation=aggregation))
    (expected,) = shares(fewer, shape)
    batch = RolloutBatch.from_groups(groups, version=0)
    in_loss = torch.arange(len(batch)) % 3 != 2
    advantages = torch.zeros(len(batch))
    advantages[in_loss] = expected.advantages
    prepared = Prepared(advantages, in_loss, in_loss)
    (part,) = split(Taken(0, 0, batch, {}, groups), prepared, shape)
    taken = vars(Taken(0, 0, batch, {}, None))
    masked = Rollout(**taken, **vars(part), advantages=advantages)
    ((loss, gradient),) = losses_and_gradients([masked], shape, objective, torch.float64)
    ((its_loss, its_gradient),) = losses_and_gradients([expected], shape, objective, torch.float64)
    assert torch.allclose(loss, its_loss, atol=1e-12)
    assert torch.allclose(gradient, its_gradient, atol=1e-12)


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf"), 1e39])
def test_advantages_that_would_break_the_weights_are_refused_with_their_prompt(wrong):
    groups = make_groups([[(2, 5), (3, 4)]] * 2, seed=1)
    batch = RolloutBatch.from_groups(groups, version=0)
    advantages = torch.tensor([0.5, -0.5, 0.5, wrong], dtype=torch.float64)
    key, rewards = groups[1].prompt.key, [t.reward for t in groups[1].trajectories]
    told = re.escape(f"of prompt {key}, with the rewards {rewards}")
    with pytest.raises(ConfigError, match=f"advantages must be finite in fp32, got .* {told}"):
        trainable(advantages, batch)
    with pytest.raises(ConfigError, match="advantages must be finite in fp32, got"):
        trainable(advantages.repeat(4), batch)  # of tokens
    assert trainable(advantages.nan_to_num(0, 0, 0).clamp(-1, 1), batch).dtype == torch.float32


def test_every_rank_has_the_same_number_of_micro_batches_and_whole_groups_make_minibatches():
    groups = make_groups([[(2, 30), (1, 2)], [(1, 1), (1, 1)], [(4, 9), (2, 2)], [(1, 3)] * 2], 2)
    rollouts = shares(groups, Shape(2, 1, max_tokens=8, num_ranks=3))
    for index in range(2):
        assert len({len(r.plans[index]) for r in rollouts}) == 1
        rows = [
            int(r.sequences.trajectory_index[row])
            for r in rollouts
            for micro in r.plans[index]
            for row in micro
        ]
        assert sorted(rows) == list(range(4 * index, 4 * index + 4))


def test_ranks_that_compute_rows_together_get_the_same_tokens():
    groups = make_groups([[(2, 30), (1, 2)], [(1, 1), (1, 1)], [(4, 9), (2, 2)], [(1, 3)] * 2], 2)
    pairs = shares(groups, Shape(2, 1, max_tokens=12, num_ranks=4, row_ranks=2))
    alone = shares(groups, Shape(2, 1, max_tokens=12, num_ranks=2))
    assert len(pairs) == 4
    for rank, rollout in enumerate(pairs):
        assert rollout.plans == alone[rank // 2].plans
        assert torch.equal(rollout.sequences.input_ids, alone[rank // 2].sequences.input_ids)


@pytest.mark.parametrize("minibatches", [2, 3, 4, 7])
def test_groups_that_do_not_divide_evenly_are_all_trained_on(minibatches):
    groups = make_groups([[(2, 3), (2, 4)]] * 5, seed=0)
    (rollout,) = shares(groups, Shape(minibatches, 1, max_tokens=100))
    assert sorted(rollout.sequences.trajectory_index.tolist()[-10:]) == list(range(10))
    assert sum(d.groups for d in rollout.denominators) == 5


def test_with_nothing_to_learn_each_rank_still_has_a_micro_batch():
    groups = make_groups([[(2, 3), (2, 3)]] * 2, seed=0)
    nothing = torch.zeros(4, dtype=torch.bool)
    for rollout in shares(groups, Shape(1, 1, 100, num_ranks=3), nothing):
        assert len(rollout.plans[0]) == 1
        assert len(rollout.sequences) == 1


class Source:
    """Hands out the same groups, one version after the other; one rank."""

    def __init__(self, groups, **known):
        self.groups = groups
        self.known = known
        self.version = 0

    def take(self):
        batch = RolloutBatch.from_groups(self.groups, self.version)
        self.version += 1
        metrics = {"reward/mean": 0.5, **self.known}
        return Taken(self.version - 1, self.version - 1, batch, metrics, self.groups)

    def share(self, parts):
        return parts[0]


def test_the_loader_has_a_length_and_no_end_and_marks_first_and_last_steps():
    source = Source(make_groups([[(1, 2), (1, 2)]] * 4, seed=3))
    shape = Shape(minibatches=2, passes=3, max_tokens=100)
    trained = torch.ones(8, dtype=torch.bool)
    loader = RolloutLoader(source, lambda batch: Prepared(batch.rewards, trained), shape, 5)
    assert len(loader) == 5 * 6
    steps = list(itertools.islice(loader, 13))
    assert source.version == 3  # nothing is fetched ahead
    assert [s.is_first for s in steps] == [True, *[False] * 5] * 2 + [True]
    assert [s.is_last for s in steps] == [*[False] * 5, True] * 2 + [False]
    assert [(s.pass_index, s.index) for s in steps[:6]] == [
        (p, m) for p in range(3) for m in range(2)
    ]
    assert steps[0].rollout.metrics.keys() == {"reward/mean", "time/wait_rollout_s"}
    assert steps[12].rollout.version == 2
    loader.load_state_dict(loader.state_dict())


def test_what_was_waited_for_servers_before_counts_as_a_wait_for_the_batch():
    source = Source(make_groups([[(1, 2), (1, 2)]] * 4, seed=3), **{WAITED: 1000.0})
    trained = torch.ones(8, dtype=torch.bool)
    shape = Shape(minibatches=2, passes=3, max_tokens=100)
    loader = RolloutLoader(source, lambda batch: Prepared(batch.rewards, trained), shape, 5)
    assert loader.next_rollout().metrics[WAITED] >= 1000.0


def test_the_steps_of_a_rollout_are_known_without_the_loader():
    (rollout,) = shares(make_groups([[(1, 2), (1, 2)]] * 2, seed=3), Shape(2, 1, 100))
    assert len(list(minibatches(rollout, Shape(2, 2, 100)))) == 4


# ---- packing ------------------------------------------------------------------------------------

PACKING_LENGTHS = st.lists(st.integers(1, 200), max_size=60)


@settings(deadline=None)
@given(PACKING_LENGTHS, st.integers(1, 300))
def test_each_sequence_is_in_one_micro_batch_and_only_a_long_one_exceeds_the_budget(
    lengths, budget
):
    plan = plan_micro_batches(lengths, budget)
    assert sorted(i for positions in plan for i in positions) == list(range(len(lengths)))
    for positions in plan:
        assert positions == sorted(positions)
        assert sum(lengths[i] for i in positions) <= budget or len(positions) == 1


@settings(deadline=None)
@given(PACKING_LENGTHS, st.integers(200, 400))
def test_micro_batches_are_few(lengths, budget):
    # First-fit leaves at most one micro-batch that is no more than half full.
    plan = plan_micro_batches(lengths, budget)
    assert max(0, len(plan) - 1) * budget <= 2 * sum(lengths)


def test_micro_batches_are_even_and_no_more_for_it():
    plan = plan_micro_batches([600] * 66, 12288)
    assert max(map(len, plan)) == 17
    assert len(plan) == 4
    assert [i for positions in plan for i in positions] == list(range(66))


def test_a_budget_of_ten_packs_seven_with_three_and_six_with_four():
    assert plan_micro_batches([3, 7, 4, 6], 10) == [[0, 1], [2, 3]]


def test_neighbours_who_share_a_prompt_stay_together_unless_that_takes_a_pass_more():
    assert plan_micro_batches([1, 3, 2, 2, 1, 3, 2, 2], 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(plan_micro_batches([1, 5, 1, 5, 2, 2], 8)) == 2


@settings(deadline=None)
@given(PACKING_LENGTHS, st.integers(1, 8))
def test_shares_cover_all_and_differ_by_at_most_one_sequence_in_cost(costs, num_ranks):
    shares = balance(costs, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert shares == balance(costs, num_ranks)


@settings(deadline=None)
@given(PACKING_LENGTHS, st.integers(1, 6), st.integers(1, 300))
def test_every_rank_gets_as_many_micro_batches_as_the_others(lengths, num_ranks, budget):
    shares = balance(lengths, num_ranks)
    plans = plan_ranks(lengths, shares, budget)
    assert len({len(plan) for plan in plans}) == 1
    for share, plan in zip(shares, plans, strict=True):
        assert sorted(i for positions in plan for i in positions) == share
        for positions in plan:
            assert sum(lengths[i] for i in positions) <= budget or len(positions) <= 1


def test_a_rank_with_too_few_sequences_gets_empty_micro_batches():
    assert plan_ranks([9, 9, 9, 9], [[0, 1, 2], [3]], 9) == [[[0], [1], [2]], [[3], [], []]]


def test_a_rank_splits_its_micro_batches_rather_than_run_empty_ones():
    plans = plan_ranks([9, 9, 1, 2, 3], [[0, 1], [2, 3, 4]], 9)
    assert len(plans[1]) == 2
    assert all(plans[1])
