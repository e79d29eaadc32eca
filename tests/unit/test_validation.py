"""Held-out prompts as a dataloader."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.errors import ConfigError
from lightning_grpo.types import CI_HIGH, CI_LOW, Group, is_interval
from lightning_grpo.validation import (
    Evaluation,
    EvaluationBatch,
    EvaluationLoader,
    EvaluationMeans,
    PromptMean,
    Scores,
    majority_reward,
    pass_at_k,
    sampled_metrics,
    score_groups,
    score_matrix,
)
from tests.fakes.tiny_run import make_group


def test_the_next_chunk_is_asked_before_this_one_is_waited_for():
    told = []
    loader = EvaluationLoader(
        "hard", 7, 3, lambda *chunk: told.append(("ask", *chunk)),
        lambda *chunk: told.append(("answer", *chunk)),
    )  # fmt: skip
    assert len(loader) == 3
    list(loader)
    ask, answer = ("ask", "hard"), ("answer", "hard")
    assert told == [
        (*ask, 0, 3), (*ask, 3, 6), (*answer, 0, 3), (*ask, 6, 7), (*answer, 3, 6), (*answer, 6, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(("limit", "asked"), [(2, 6), (9, 7), (0.7, 6), (1.0, 7), (0, 0)])
def test_no_more_is_asked_than_the_trainer_will_read(limit, asked):
    last = [0]
    loader = EvaluationLoader(
        "", 7, 3, lambda name, first, end: last.append(end), lambda *chunk: chunk, limit, 5
    )
    assert len(loader) == 3
    list(loader)
    assert last[-1] == asked
    assert loader.num_answers == 5 * asked


def test_an_empty_set_asks_nothing():
    loader = EvaluationLoader("", 0, 3, pytest.fail, pytest.fail)
    assert len(loader) == 0
    assert list(loader) == []


def test_means_of_several_sets_are_kept_apart_and_weigh_prompts_alike():
    means = EvaluationMeans(Evaluation(num_samples=2, greedy=True))
    first = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    means.update(EvaluationBatch("a", first, torch.tensor([1.0, 0.0]), [make_group(0)]))
    means.update(EvaluationBatch("a", first[:1], torch.tensor([1.0]), [make_group(1)]))
    means.update(EvaluationBatch("", first[1:], None, []))
    record = means.record(step=7)
    assert record.step == 7
    assert record.metrics["eval/a/avg_at_2"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert record.metrics["eval/a/greedy"] == pytest.approx(2 / 3)
    assert record.metrics["eval/a/pass_at_2"] == 1.0
    assert record.metrics["eval/avg_at_2"] == 1.0
    assert "eval/greedy" not in record.metrics
    scores = [name for name in record.metrics if not is_interval(name)]
    assert all(record.metrics.keys() >= {n + CI_LOW, n + CI_HIGH} for n in scores)
    assert len(record.groups["a"]) == 2


# ---- avg@k, pass@k and their confidence intervals -----------------------------------------------


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
    values = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0])
    mean = PromptMean()
    mean.update(values[:2], are_fractions=False)
    mean.update(values[2:], are_fractions=False)
    assert float(mean.compute()) == pytest.approx(1.2)
    half = 1.96 * float(values.std()) / math.sqrt(5)
    assert mean.interval() == pytest.approx((1.2 - half, 1.2 + half), rel=1e-3)
    assert all(map(math.isnan, interval([1.0])))


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
    mean.update(torch.tensor([0.0, 1.0]), are_fractions=True)
    assert float(mean.compute()) == 0.5


def interval(values, are_fractions=True):
    mean = PromptMean()
    mean.update(torch.tensor(values, dtype=torch.float64), are_fractions)
    return mean.interval()


@pytest.mark.parametrize(("n", "wilson"), [(2, 0.6576), (10, 0.2775), (100, 0.0370)])
def test_all_right_and_all_wrong_have_wilsons_interval(n, wilson):
    assert interval([0.0] * n) == pytest.approx((0.0, wilson), abs=1e-4)
    assert interval([1.0] * n) == pytest.approx((1 - wilson, 1.0), abs=1e-4)


def test_a_fraction_has_wilsons_interval():
    assert interval([1.0] * 99 + [0.0]) == pytest.approx((0.9455, 0.9982), abs=1e-4)
    assert interval([1.0] * 50 + [0.0] * 50) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=60))
def test_the_interval_of_fractions_holds_their_mean_and_stays_where_fractions_are(values):
    low, high = interval(values)
    assert 0 <= low <= sum(values) / len(values) + 1e-12
    assert sum(values) / len(values) - 1e-12 <= high <= 1


def width(values):
    low, high = interval(values)
    return high - low


def test_means_of_several_samples_have_an_interval_of_their_own_spread():
    assert width([0.4] * 50 + [0.6] * 50) < width([0.0] * 50 + [1.0] * 50) / 3
    assert 0 < width([0.5] * 100) < width([0.4] * 50 + [0.6] * 50)


@pytest.mark.parametrize("values", [[2.0] * 10, [-0.1] * 10, [0.5] * 10])
def test_equal_rewards_that_are_no_fractions_have_no_interval(values):
    assert all(map(math.isnan, interval(values, are_fractions=False)))
    low, high = interval([*values, 3.0], are_fractions=False)
    assert low < high


def test_rewards_around_zero_have_the_normal_interval():
    values = [-1.0, 1.0, 1.0, 0.5, -1.0]
    half = 1.96 * float(torch.tensor(values).std()) / math.sqrt(5)
    assert interval(values, are_fractions=False) == pytest.approx(
        (0.1 - half, 0.1 + half), rel=1e-3
    )


def logged(*sampled):
    means = EvaluationMeans(Evaluation(num_samples=2, greedy=False))
    for rows in sampled:
        means.update(EvaluationBatch("", torch.tensor(rows, dtype=torch.float64), None, []))
    return means.record(0).metrics


def test_a_score_whose_rewards_are_0_or_1_stays_between_them():
    metrics = logged([[1.0, 1.0]] * 9, [[1.0, 0.0]])
    assert metrics["eval/avg_at_2_ci95_high"] < 1
    assert metrics["eval/pass_at_2_ci95_high"] == pytest.approx(1)


def test_that_all_rewards_seen_lie_between_0_and_1_proves_no_bound():
    metrics = logged([[1.0, 1.0]] * 9, [[0.5, 0.0]])
    assert metrics["eval/avg_at_2_ci95_high"] > 1
    assert metrics["eval/pass_at_2_ci95_high"] == pytest.approx(1)  # a chance, whatever the rewards


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


# ---- maj@k: the reward of the most common answer, against enumeration ---------------------------


def enumerated(answers, right):
    """How often the right answer wins over every order of counting: who gets there first wins."""
    voting = [answer for answer in answers if answer is not None]
    orders = list(itertools.permutations(voting))
    won = 0
    for order in orders:
        counts, best, winner = {}, 0, None
        for answer in order:
            counts[answer] = counts.get(answer, 0) + 1
            if counts[answer] > best:
                best, winner = counts[answer], answer
        won += winner == right
    return won / len(orders)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_the_vote_is_what_enumeration_says(k):
    for answers in itertools.product(["a", "b", None], repeat=k):
        rewards = [float(answer == "a") for answer in answers]
        assert majority_reward(answers, rewards) == pytest.approx(enumerated(answers, "a"))


def test_completions_of_one_answer_may_differ_in_reward():
    assert majority_reward(["a", "a", "b"], [1.0, 0.5, 0.0]) == 0.75
    assert majority_reward(["a", "b"], [1.0, 0.0]) == 0.5
    assert majority_reward([None, None], [1.0, 1.0]) == 0.0


def group(answers, rewards):
    made = make_group(0, tuple(rewards))
    return replace_texts(made, answers)


def replace_texts(made, texts):
    pairs = zip(made.trajectories, texts, strict=True)
    return Group(made.prompt, tuple(replace(t, text=x) for t, x in pairs), 0)


def test_it_is_logged_where_an_extractor_is_given():
    evaluation = Evaluation(num_samples=3, greedy=True, extract_answer=lambda text: text or None)
    sampled = [group(["a", "a", "b"], [1.0, 1.0, 0.0]), group(["a", "b", "b"], [1.0, 0.0, 0.0])]
    greedy = [group(["a"], [1.0]), group(["b"], [0.0])]
    scores = score_groups(sampled, greedy, evaluation)
    assert scores.majority.tolist() == [1.0, 0.0]
    means = EvaluationMeans(evaluation)
    means.update(EvaluationBatch("", scores.sampled, scores.greedy, [], scores.majority))
    metrics = means.record(0).metrics
    assert metrics["eval/maj_at_3"] == 0.5
    assert metrics["eval/maj_at_3_ci95_low"] == pytest.approx(0.0945, abs=1e-3)
    assert metrics["eval/maj_at_3_ci95_high"] == pytest.approx(0.9055, abs=1e-3)
    assert metrics["eval/greedy"] == 0.5


def test_without_an_extractor_or_a_vote_there_is_none():
    two = [group(["a", "b"], [1.0, 0.0])]
    assert score_groups(two, None, Evaluation(num_samples=2)).majority is None
    one = Evaluation(num_samples=1, extract_answer=str)
    assert score_groups([group(["a"], [1.0])], None, one).majority is None
    assert score_groups(None, None, one) == Scores()


def test_avg_and_pass_at_k_are_means_over_every_choice_of_samples():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    metrics = sampled_metrics(rewards, 0.5)
    for row, drawn in enumerate(rewards.tolist()):
        assert metrics["avg_at_4"][row] == sum(drawn) / 4
        for j in (2, 4):
            draws = list(itertools.combinations(drawn, j))
            expected = sum(max(draw) for draw in draws) / len(draws)
            assert float(metrics[f"pass_at_{j}"][row]) == pytest.approx(expected)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        chances = torch.rand(60, generator=generator, dtype=torch.float64)
        draws = torch.rand(60, 4, generator=generator, dtype=torch.float64)
        right = (draws < chances[:, None]).double()
        mean = PromptMean()
        mean.update(right.mean(dim=1), are_fractions=True)
        low, high = mean.interval()
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_parts_of_two_ranks_come_to_what_one_has():
    values = torch.rand(11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, parts = PromptMean(), [PromptMean(), PromptMean()]
    whole.update(values, True)
    parts[0].update(values[:4], True)
    parts[1].update(values[4:], True)
    joined = parts[0]
    joined.merge_state(parts[1])
    assert float(joined.compute()) == pytest.approx(float(whole.compute()), abs=1e-15)
    assert joined.interval() == pytest.approx(whole.interval(), abs=1e-12)
