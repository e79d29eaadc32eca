"""What truncated completions get: by hand, and as the advantages and denominators see it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_grpo.algorithm.advantages import GroupAdvantage, Truncation, soft_overlong_penalty
from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import Sampling
from tests.fakes.tiny_run import make_group

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
