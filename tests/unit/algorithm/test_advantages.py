import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.algorithm.advantages import (
    GroupAdvantage,
    LeaveOneOutAdvantage,
    ReinforceAdvantage,
    group_mean,
    group_std,
    has_no_variance,
)
from lightning_grpo.errors import ConfigError

BASELINES = [
    GroupAdvantage(),
    GroupAdvantage(divide_by_std=False),
    GroupAdvantage(ddof=0),
    LeaveOneOutAdvantage(),
]


def test_two_of_four_right_by_hand():
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    # mean 1/2; sum of squares 4 * 1/4 = 1; std sqrt(1/3) with ddof 1, 1/2 with ddof 0
    sample = 0.5 / (3**-0.5 + 1e-4)
    assert GroupAdvantage()(rewards, ids).tolist() == pytest.approx([sample, -sample] * 2)
    population = 0.5 / (0.5 + 1e-4)
    assert GroupAdvantage(ddof=0)(rewards, ids)[0].item() == pytest.approx(population)
    assert GroupAdvantage(divide_by_std=False)(rewards, ids).tolist() == [0.5, -0.5, 0.5, -0.5]
    # 1 - mean(0, 1, 0) = 2/3
    assert LeaveOneOutAdvantage()(rewards, ids).tolist() == pytest.approx([2 / 3, -2 / 3] * 2)
    assert ReinforceAdvantage()(rewards, ids).tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("advantage", BASELINES)
@settings(deadline=None)
@given(
    value=st.floats(-1e6, 1e6, width=32),
    size=st.integers(1, 17),
    others=st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=5),
)
def test_a_group_of_equal_rewards_gets_exactly_zero(advantage, value, size, others):
    rewards = torch.tensor([value] * size + others)
    ids = torch.tensor([3] * size + [1] * len(others))
    assert (advantage(rewards, ids)[:size] == 0).all()
    assert has_no_variance(rewards, ids)[:size].all()


@pytest.mark.parametrize("advantage", [*BASELINES, ReinforceAdvantage()])
@settings(deadline=None)
@given(
    rewards=st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6),
    order=st.permutations(range(6)),
)
def test_the_order_of_trajectories_and_the_names_of_groups_do_not_matter(advantage, rewards, order):
    rewards, order = torch.tensor(rewards, dtype=torch.float64), torch.tensor(order)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = advantage(rewards, ids)[order]
    assert torch.allclose(advantage(rewards[order], 7 - 5 * ids[order]), expected, atol=1e-12)


@pytest.mark.parametrize("advantage", BASELINES)
@settings(deadline=None)
@given(shift=st.floats(-100, 100))
def test_a_constant_added_to_a_group_changes_nothing(advantage, shift):
    rewards = torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 1])
    shifted = advantage(rewards + shift * (ids == 0), ids)
    assert torch.allclose(shifted, advantage(rewards, ids), atol=1e-9)


def test_group_statistics_agree_with_torch():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(12, generator=generator, dtype=torch.float64)
    ids = torch.arange(12) % 3
    for group in range(3):
        member = rewards[ids == group]
        assert torch.allclose(group_mean(rewards, ids)[ids == group], member.mean())
        assert torch.allclose(group_std(rewards, ids)[ids == group], member.std())
        assert torch.allclose(
            group_std(rewards, ids, ddof=0)[ids == group], member.std(correction=0)
        )


@pytest.mark.parametrize("settings", [{"ddof": 2}, {"eps": 0.0}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=f"`{next(iter(settings))}` must be"):
        GroupAdvantage(**settings)


HALF = 0.5**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 1e20], [-HALF, HALF]),
        ([-3e38, 3e38], [-HALF, HALF]),
        ([1e30, 1e30, 0.0], [3**-0.5, 3**-0.5, -2 * 3**-0.5]),
        ([1e30, 1e30], [0.0, 0.0]),
        ([3e38, 3e38, 3e38], [0.0, 0.0, 0.0]),
    ],
)
def test_rewards_of_any_size_get_the_advantages_of_their_order(rewards, expected, dtype):
    values, ids = torch.tensor(rewards, dtype=dtype), torch.zeros(len(rewards), dtype=torch.int64)
    found = GroupAdvantage()(values, ids)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    unscaled = GroupAdvantage(divide_by_std=False)(values, ids)
    assert unscaled.isfinite().all()
    assert group_std(values.double(), ids).isfinite().all()
    assert has_no_variance(values, ids).all() == (len(set(rewards)) == 1)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-30, 1e-3, 1.0, 1e20, 1e150, 1e300])
def test_a_standard_deviation_has_the_scale_of_its_values(scale):
    ids = torch.zeros(4, dtype=torch.int64)
    values = torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    found = group_std(values * scale, ids)
    assert (found / scale).tolist() == pytest.approx([values.std().item()] * 4)


def test_rewards_that_differ_far_behind_the_point_differ():
    ids = torch.zeros(2, dtype=torch.int64)
    apart = torch.tensor([1e-30, 2e-30], dtype=torch.float64)
    assert not has_no_variance(apart, ids).any()
    low, high = GroupAdvantage()(apart, ids).tolist()
    assert low == -high < 0  # small, as eps is large beside them
    large = torch.tensor([1e8, 1e8 + 1], dtype=torch.float64)
    assert GroupAdvantage()(large, ids).tolist() == pytest.approx([-HALF, HALF], rel=1e-3)
    assert LeaveOneOutAdvantage()(large, ids).tolist() == [-1.0, 1.0]
