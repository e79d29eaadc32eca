"""maj@k: the reward of the most common answer, against enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lightning_grpo.types import Group
from lightning_grpo.validation import (
    Evaluation,
    EvaluationBatch,
    EvaluationMeans,
    PromptMean,
    Scores,
    majority_reward,
    sampled_metrics,
    score_groups,
)
from tests.fakes.tiny_run import make_group


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
    assert metrics["eval/maj_at_3_ci95"] == pytest.approx(0.98, abs=1e-3)
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
        mean.update(right.mean(dim=1))
        covered += abs(float(mean.compute()) - 0.5) <= mean.half_width()
    assert 0.92 <= covered / 400 <= 0.98


def test_parts_of_two_ranks_come_to_what_one_has():
    values = torch.rand(11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, parts = PromptMean(), [PromptMean(), PromptMean()]
    whole.update(values)
    parts[0].update(values[:4])
    parts[1].update(values[4:])
    joined = parts[0]
    joined.merge_state(parts[1])
    assert float(joined.compute()) == pytest.approx(float(whole.compute()), abs=1e-15)
    assert joined.half_width() == pytest.approx(whole.half_width(), abs=1e-12)
