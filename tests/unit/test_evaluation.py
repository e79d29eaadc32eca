"""avg@k, pass@k and their confidence intervals."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from lightning_grpo.errors import ConfigError
from lightning_grpo.evaluation import (
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
