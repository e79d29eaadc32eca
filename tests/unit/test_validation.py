"""Held-out prompts as a dataloader."""

from __future__ import annotations

import pytest
import torch

from lightning_grpo.validation import Evaluation, EvaluationBatch, EvaluationLoader, EvaluationMeans
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
    assert {f"{name}_ci95" for name in record.metrics if not name.endswith("_ci95")} <= {
        *record.metrics
    }
    assert len(record.groups["a"]) == 2
