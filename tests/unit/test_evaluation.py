"""avg@k, pass@k and their confidence intervals."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from lightning_grpo.errors import ConfigError
from lightning_grpo.validation import (
    Evaluation,
    PromptMean,
    pass_at_k,
    sampled_metrics,
    score_matrix,
)
from tests.fakes.tiny_run import make_group


@pytest.mark.parametrize(
    ("n", "right", "k"), [(4, 1, 2), (8, 3, 4), (5, 0, 5), (5, 5, 1), (6, 4, 3)]
)
def test_pass_at_k_is_the_fraction_of_draws_with_a_right_answer(n, right, k):
    draws = list(combinations([1] * right + [0] * (n - right), k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    (got,) = pass_at_k(torch.tensor([n]), torch.tensor([right]), k).tolist()
    assert got == pytest.approx(expected, abs=1e-12)


def test_sampled_metrics_name_their_numbers_and_share_one_threshold():
    rewards = torch.tensor([[1.0, 0.0, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    metrics = sampled_metrics(rewards, threshold=0.5)
    assert metrics.keys() == {"avg_at_4", "pass_at_2", "pass_at_4"}
    assert metrics["avg_at_4"].tolist() == [0.5, 0.0]
    assert metrics["pass_at_4"].tolist() == [1.0, 0.0]
    assert metrics["pass_at_2"].tolist() == pytest.approx([5 / 6, 0.0])
    assert sampled_metrics(rewards[:, :1], 0.5).keys() == {"avg_at_1"}
    assert {"pass_at_2", "pass_at_3"} <= sampled_metrics(rewards[:, :3], 0.5).keys()


def test_a_mean_has_the_interval_of_its_prompts_and_none_for_one():
    values = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    mean = PromptMean()
    mean.update(values[:2])
    mean.update(values[2:])
    assert float(mean.compute()) == pytest.approx(0.6)
    spread = float(values.std()) / math.sqrt(5)
    assert mean.half_width() == pytest.approx(1.96 * spread, rel=1e-3)
    one = PromptMean()
    one.update(torch.tensor([1.0]))
    assert math.isnan(one.half_width())


@pytest.fixture
def group_of_one_device():
    """A process group as NCCL's: it moves tensors of GPUs and no others."""
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_mean_asks_nothing_of_a_group_that_moves_gpu_tensors_only(group_of_one_device):
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.zeros(1))
    mean = PromptMean()
    mean.update(torch.tensor([0.0, 1.0]))
    assert float(mean.compute()) == 0.5


def half_width(values):
    mean = PromptMean()
    mean.update(torch.tensor(values, dtype=torch.float64))
    return mean.half_width()


@pytest.mark.parametrize("number", [0.0, 1.0])
@pytest.mark.parametrize(("n", "wilson"), [(2, 0.6576), (10, 0.2775), (100, 0.0370)])
def test_all_right_and_all_wrong_have_wilsons_interval(number, n, wilson):
    assert half_width([number] * n) == pytest.approx(wilson, abs=1e-4)


def test_nearly_all_right_has_wilsons_interval_and_half_of_them_the_normal_one():
    # 99 of 100: Wilson's interval is 0.9455 to 0.9982.
    assert half_width([1.0] * 99 + [0.0]) == pytest.approx(0.99 - 0.9455, abs=1e-4)
    assert half_width([1.0] * 50 + [0.0] * 50) == pytest.approx(0.0985, abs=1e-4)


def test_means_of_several_samples_have_an_interval_of_their_own_spread():
    spread = half_width([0.0] * 50 + [1.0] * 50)
    assert half_width([0.4] * 50 + [0.6] * 50) < spread / 3
    assert 0 < half_width([0.5] * 100) < half_width([0.4] * 50 + [0.6] * 50)


@pytest.mark.parametrize("values", [[2.0] * 10, [-0.1] * 10])
def test_equal_rewards_that_are_no_shares_have_no_interval(values):
    assert math.isnan(half_width(values))
    assert half_width([*values, 3.0]) > 0


def test_rewards_around_zero_have_the_normal_interval():
    values = [-1.0, 1.0, 1.0, 0.5, -1.0]
    spread = float(torch.tensor(values).std()) / math.sqrt(5)
    assert half_width(values) == pytest.approx(1.96 * spread, rel=1e-3)


def test_scores_are_read_in_order_of_prompts_and_samples():
    groups = [make_group(0, (0.0, 1.0)), make_group(1, (0.5, 0.25))]
    assert score_matrix(groups, 2).tolist() == [[0.0, 1.0], [0.5, 0.25]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "`evaluation.num_samples` must be >= 1, got 0"),
        ({"greedy": False, "sampled": False}, "`evaluation` must sample something"),
    ],
)
def test_an_evaluation_that_samples_nothing_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Evaluation(**settings)
