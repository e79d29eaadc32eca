"""The generator of the quickstart's problems."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generator():
    path = REPOSITORY / "examples/quickstart/problems.py"
    spec = importlib.util.spec_from_file_location("quickstart_problems", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def take(generator, seed, count, held_out=False):
    return list(itertools.islice(generator.problems(seed, held_out=held_out), count))


def test_a_step_is_written_with_gsm8k_calculator_mark(generator):
    assert str(generator.Step(9, "*", 5)) == "9 * 5 = <<9*5=45>>45"


def test_the_same_seed_gives_the_same_problems_and_another_seed_others(generator):
    assert take(generator, 3, 50) == take(generator, 3, 50)
    assert take(generator, 3, 50) != take(generator, 4, 50)


def test_the_shipped_rows_are_the_generators(generator):
    for split, held_out in (("train", False), ("test", True)):
        path = REPOSITORY / f"examples/quickstart/data/{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        distinct = {}
        for problem in generator.problems(0, held_out=held_out):
            distinct.setdefault(problem.question, problem.answer)
            if len(distinct) == len(rows):
                break
        assert [(row["question"], row["answer"]) for row in rows] == list(distinct.items())


def test_no_problem_needs_a_negative_number(generator):
    for problem in take(generator, 5, 2000):
        assert all(step.result > 0 for step in problem.steps)


def test_a_second_step_starts_from_the_first_result(generator):
    for problem in take(generator, 6, 500):
        for before, after in itertools.pairwise(problem.steps):
            assert after.left == before.result


def test_over_a_third_of_the_mixed_demonstrations_is_careful_and_the_rest_has_three_habits(
    generator,
):
    rng = random.Random(0)
    drawn = take(generator, 7, 4000)
    shown = [generator.mixed_demonstration(problem, rng) for problem in drawn]
    careful = sum(s == p.answer for s, p in zip(shown, drawn, strict=True)) / len(drawn)
    guesses = sum(s.startswith("####") for s in shown) / len(drawn)
    unmarked = sum("####" not in s for s in shown) / len(drawn)
    assert careful == pytest.approx(0.385, abs=0.03)
    assert guesses == pytest.approx(0.39, abs=0.03)
    assert unmarked == pytest.approx(0.065, abs=0.02)


def test_a_wrong_step_is_carried_on_consistently(generator):
    rng = random.Random(1)
    seen = 0
    for problem in take(generator, 8, 2000):
        shown = generator.mixed_demonstration(problem, rng)
        if shown.startswith("####") or "####" not in shown or shown == problem.answer:
            continue
        seen += 1
        last = shown.splitlines()[-2].rpartition(">>")[2]
        assert shown.endswith(f"#### {last}")
    assert seen > 200
