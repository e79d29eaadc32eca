from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from lightning_grpo.algorithm.advantages import (
    GroupAdvantage,
    LeaveOneOutAdvantage,
    Truncation,
    soft_overlong_penalty,
)
from lightning_grpo.algorithm.batch import MicroBatch, RolloutBatch, Sequences
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import Group, Prompt, RouterShape, Routes, Sampling, Trajectory
from tests.fakes.tiny_run import make_group


def trajectory(prompt, response, reward=0.0, versions=None, temperature=1.0):
    return Trajectory(
        input_ids=tuple(range(prompt + response)),
        response_mask=(False,) * prompt + (True,) * response,
        logprobs=(0.0,) * prompt + tuple(-0.1 * (t + 1) for t in range(response)),
        versions=(-1,) * prompt + tuple(versions or (4,) * response),
        reward=reward,
        rewards={"right": reward},
        text="",
        truncated=response > 3,
        temperature=temperature,
    )


def two_groups():
    first = (trajectory(2, 3, 1.0, (4, 5, 5)), trajectory(2, 1, 0.0))
    second = (trajectory(3, 2, 0.5, temperature=0.7), trajectory(3, 4))
    return [
        Group(Prompt((1, 2), "a", columns={"answer": "x"}, row=7), first, 4),
        Group(Prompt((1, 2, 3), "b", columns={"answer": "y"}, row=9, pass_index=1), second, 4),
    ]


def test_scalars_of_whole_groups_stand_in_order():
    batch = RolloutBatch.from_groups(two_groups(), version=6)
    assert len(batch) == 4
    assert batch.num_groups == 2
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert batch.rewards_by_name["right"].tolist() == [1.0, 0.0, 0.5, 0.0]
    assert batch.response_lengths.tolist() == [3, 1, 2, 4]
    assert batch.sequence_lengths.tolist() == [5, 3, 5, 7]
    assert batch.truncated.tolist() == [False, False, False, True]
    assert batch.oldest_versions.tolist() == [4, 4, 4, 4]
    assert batch.newest_versions.tolist() == [5, 4, 4, 4]
    assert batch.keys == [(0, 7), (0, 7), (1, 9), (1, 9)]
    assert [c["answer"] for c in batch.columns] == ["x", "x", "y", "y"]


def test_rewards_that_fp32_would_not_tell_apart_stay_apart():
    pair = (trajectory(2, 3, 1e8), trajectory(2, 3, 1e8 + 1))
    batch = RolloutBatch.from_groups([Group(Prompt((1, 2), "a"), pair, 4)], version=6)
    assert batch.rewards.tolist() == batch.rewards_by_name["right"].tolist() == [1e8, 1e8 + 1]
    assert LeaveOneOutAdvantage()(batch.rewards, batch.group_ids).tolist() == [-1.0, 1.0]


def test_denominators_count_the_rows_of_a_minibatch():
    batch = RolloutBatch.from_groups(two_groups(), version=6)
    assert vars_of(batch.denominators()) == (10, 4, 2)
    assert vars_of(batch.denominators([0, 1])) == (4, 2, 1)
    assert vars_of(batch.denominators([])) == (0, 0, 0)


def vars_of(denominators):
    return denominators.tokens, denominators.sequences, denominators.groups


def test_a_reward_that_only_some_trajectories_have_is_nan_for_the_rest():
    groups = two_groups()
    odd = trajectory(2, 2)
    odd.rewards["style"] = 0.25
    batch = RolloutBatch.from_groups(
        [Group(groups[0].prompt, (*groups[0].trajectories, odd), 4)], 6
    )
    assert batch.rewards_by_name["style"].isnan().tolist() == [True, True, False]


def sequences():
    trajectories = [t for g in two_groups() for t in g.trajectories]
    return Sequences.from_trajectories(trajectories, range(4))


def test_selected_sequences_keep_their_tokens_and_rows():
    picked = sequences().select([3, 0])
    assert picked.cu_seqlens.tolist() == [0, 7, 12]
    assert picked.input_ids.tolist() == [*range(7), *range(5)]
    assert picked.trajectory_index.tolist() == [3, 0]
    assert picked.response_mask.sum() == 7
    assert picked.behavior_logprobs[7:].tolist() == pytest.approx([0, 0, -0.1, -0.2, -0.3])
    assert picked.lengths.tolist() == [7, 5]
    assert len(picked) == 2
    assert picked.num_tokens == 12


def test_a_small_selection_pickles_small():
    many = Sequences.from_trajectories([trajectory(100, 100)] * 50, range(50))
    assert len(pickle.dumps(many.select([7]))) < len(pickle.dumps(many)) / 20


def test_an_empty_selection_is_a_filler_that_adds_nothing():
    filler = sequences().select([])
    assert filler.num_tokens == 2
    assert not filler.loss_mask.any()
    assert not filler.response_mask.any()


def test_a_first_token_never_enters_the_loss_since_it_has_no_probability():
    packed = Sequences.from_trajectories([trajectory(0, 3), trajectory(1, 2)], [0, 1])
    assert packed.response_mask.tolist() == [True, True, True, False, True, True]
    assert packed.loss_mask.tolist() == [False, True, True, False, True, True]
    batch = RolloutBatch.from_groups(
        [Group(Prompt((1,), "a"), (trajectory(0, 3), trajectory(1, 2)), 0)], 0
    )
    assert batch.denominators().tokens == int(packed.loss_mask.sum())


def test_a_micro_batch_repeats_what_belongs_to_the_trajectory_for_each_token():
    rollout = RolloutBatch.from_groups(two_groups(), version=6)
    picked = sequences().select([2, 1])
    batch = MicroBatch.from_sequences(
        picked, rollout, torch.tensor([1.0, 2.0, 3.0, 4.0]), rollout.denominators()
    )
    assert batch.advantages.tolist() == [3.0] * 5 + [2.0] * 3
    assert batch.temperature.tolist() == pytest.approx([0.7] * 5 + [1.0] * 3)
    assert batch.denominators.tokens == 10


def test_advantages_of_tokens_are_cut_from_the_whole_rollout_batch():
    rollout = RolloutBatch.from_groups(two_groups(), version=6)
    per_token = torch.arange(20.0)
    batch = MicroBatch.from_sequences(
        sequences().select([3, 1]), rollout, per_token, rollout.denominators()
    )
    assert batch.advantages.tolist() == [*range(13, 20), 5, 6, 7]
    filler = MicroBatch.from_sequences(
        sequences().select([]), rollout, per_token, rollout.denominators()
    )
    assert len(filler.advantages) == 2


def test_advantages_of_another_length_are_refused():
    rollout = RolloutBatch.from_groups(two_groups(), version=6)
    with pytest.raises(ValueError, match=r"\[trajectories\] = 4 or \[tokens\] = 20 .* got 3"):
        MicroBatch.from_sequences(sequences(), rollout, torch.zeros(3), rollout.denominators())


def test_a_batch_without_proximal_logprobs_is_anchored_at_the_policy():
    rollout = RolloutBatch.from_groups(two_groups(), version=6)
    batch = MicroBatch.from_sequences(sequences(), rollout, torch.zeros(4), rollout.denominators())
    policy = torch.zeros(20, requires_grad=True)
    anchored = batch.with_proximal(policy)
    assert anchored.proximal_logprobs is anchored.policy_logprobs
    assert not anchored.proximal_logprobs.requires_grad
    kept = anchored.with_proximal(policy + 1)
    assert kept.proximal_logprobs is anchored.proximal_logprobs
    assert kept.policy_logprobs.tolist() == [1.0] * 20


# ---- what truncated completions get: by hand, and as the advantages and denominators see it -----

CENTERED = GroupAdvantage(divide_by_std=False)


def make_batch(limit: int | None = 4) -> RolloutBatch:
    """Rewards 0, 1, 1 and 0, 1, 0 of two-token answers; the last of each group is truncated."""
    groups = []
    for row, rewards in enumerate([(0.0, 1.0, 1.0), (0.0, 1.0, 0.0)]):
        group = make_group(row, rewards)
        trajectories = [replace(t, length_limit=limit) for t in group.trajectories]
        trajectories[-1] = replace(trajectories[-1], truncated=True)
        groups.append(replace(group, trajectories=tuple(trajectories)))
    return RolloutBatch.from_groups(groups, version=0)


def test_the_penalty_falls_from_zero_to_minus_one_over_the_buffer():
    lengths, limits = torch.tensor([1, 80, 85, 90, 100, 120, 15]), torch.tensor([100] * 6 + [20])
    expected = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -0.75]
    assert soft_overlong_penalty(lengths, limits, 20).tolist() == pytest.approx(expected)


def test_by_default_a_truncated_completion_is_one_like_any_other():
    batch, truncation = make_batch(None), Truncation()
    assert truncation.rewards(batch) is batch.rewards
    assert truncation.in_loss(batch).all()
    advantages = truncation.advantages(CENTERED, batch.rewards, batch)
    assert torch.equal(advantages, CENTERED(batch.rewards, batch.group_ids))


def test_masked_it_counts_in_its_group_and_not_in_the_loss():
    batch, truncation = make_batch(), Truncation("mask")
    assert truncation.in_loss(batch).tolist() == [True, True, False] * 2
    advantages = truncation.advantages(CENTERED, batch.rewards, batch)
    assert advantages.tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3, -1 / 3, 2 / 3, -1 / 3])


def test_excluded_it_is_as_if_it_had_not_been_sampled():
    batch, truncation = make_batch(), Truncation("exclude")
    assert truncation.in_loss(batch).tolist() == [True, True, False] * 2
    advantages = truncation.advantages(CENTERED, batch.rewards, batch)
    assert advantages.tolist() == pytest.approx([-0.5, 0.5, 0.0, -0.5, 0.5, 0.0])
    everything = replace(batch, truncated=torch.ones(6, dtype=torch.bool))
    assert not truncation.advantages(CENTERED, batch.rewards, everything).any()


def test_an_advantage_for_each_token_can_be_masked_and_not_excluded():
    batch = make_batch()

    def per_token(rewards, group_ids):
        return torch.ones(4 * len(rewards))

    assert len(Truncation("mask").advantages(per_token, batch.rewards, batch)) == 24
    with pytest.raises(ConfigError, match="one advantage per trajectory, got 16 for 4"):
        Truncation("exclude").advantages(per_token, batch.rewards, batch)


def test_it_gets_another_reward_and_everyone_near_the_limit_a_penalty():
    batch = make_batch(limit=3)
    rewards = Truncation(reward=-1.0, penalty_buffer=2).rewards(batch)
    # Two tokens of at most three, over a buffer of two: half of the penalty.
    assert rewards.tolist() == pytest.approx([-0.5, 0.5, -1.5, -0.5, 0.5, -1.5])


def test_the_penalty_is_on_the_last_completion_of_several():
    (trajectory,) = make_group(0, (1.0,)).trajectories
    longer = replace(
        trajectory,
        input_ids=tuple(range(9)),
        response_mask=(False, True, True, True, False, True, True, True, True),
        logprobs=(0.0,) * 9,
        versions=(0,) * 9,
        length_limit=6,
    )
    group = replace(make_group(0), trajectories=(longer, replace(longer, length_limit=4)))
    batch = RolloutBatch.from_groups([group], version=0)
    assert batch.last_lengths.tolist() == [4, 4]
    assert Truncation(penalty_buffer=4).rewards(batch).tolist() == pytest.approx([0.5, 0.0])


def test_a_penalty_without_a_known_limit_is_refused():
    with pytest.raises(ConfigError, match="length limit of each completion, which 6 of these"):
        Truncation(penalty_buffer=2).rewards(make_batch(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"handling": "drop"}, "must be one of train, mask, exclude .*got 'drop'"),
        ({"penalty_buffer": 0}, "`truncation.penalty_buffer` must be >= 1"),
        ({"handling": "exclude", "reward": 0.0}, "`truncation.reward` must be null"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Truncation(**settings)


def test_a_buffer_longer_than_a_completion_is_refused():
    Truncation(penalty_buffer=8).check(Sampling(max_new_tokens=8))
    Truncation(penalty_buffer=8).check(None)
    with pytest.raises(ConfigError, match=r"must be <= `sampling.max_new_tokens` \(8\), got 9"):
        Truncation(penalty_buffer=9).check(Sampling(max_new_tokens=8))


def routed(trajectory, num_known, experts=8, first=1):
    """With the experts `first`, `first + 1`, ... of its first tokens: two layers, top 1."""
    shape = RouterShape(layers=2, top_k=1, experts=experts)
    numbers = range(first, first + 2 * num_known)
    encoded = b"".join(number.to_bytes(shape.width, "little") for number in numbers)
    return replace(trajectory, routes=Routes(encoded, shape))


def test_routes_stand_at_their_tokens_and_none_where_nobody_knows():
    packed = Sequences.from_trajectories(
        [routed(trajectory(2, 3), 4), trajectory(1, 1), routed(trajectory(1, 2), 2, first=21)],
        [0, 1, 2],
    )
    expected = [[1, 2], [3, 4], [5, 6], [7, 8], [255] * 2, [255] * 2, [255] * 2]
    expected += [[21, 22], [23, 24], [255] * 2]
    assert packed.routes.dtype == torch.uint8
    assert packed.routes.squeeze(2).tolist() == expected
    assert packed.select([2, 0]).routes.squeeze(2).tolist() == expected[7:] + expected[:5]
    assert packed.select([]).routes.squeeze(2).tolist() == [[255, 255]] * 2
    assert torch.equal(packed.to("cpu").routes, packed.routes)


def test_numbers_of_many_experts_take_two_bytes():
    packed = Sequences.from_trajectories([routed(trajectory(1, 2), 2, 300, first=254)], [0])
    assert packed.routes.dtype == torch.int16
    assert packed.routes.squeeze(2).tolist() == [[254, 255], [256, 257], [-1, -1]]


def test_trajectories_without_routes_carry_none():
    packed = Sequences.from_trajectories([trajectory(2, 3)], [0])
    assert packed.routes is None
    assert packed.select([0]).routes is packed.select([]).routes is None
