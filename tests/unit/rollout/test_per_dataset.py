"""A workflow of its own for each dataset."""

from __future__ import annotations

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.episodes import Attempt, EpisodeRunner
from lightning_grpo.rollout.workflow import PerDatasetWorkflow, RLVRWorkflow
from lightning_grpo.types import Prompt, Sampling
from tests.fakes.generator import FakeGenerator, InlineScorer
from tests.fakes.tokenizer import CharTokenizer
from tests.fakes.virtual_time import run_virtual

SAMPLING = Sampling(max_new_tokens=8)


def long(completion: str) -> float:
    return float(len(completion))


def one(completion: str) -> float:
    return 1.0


def make_workflow() -> PerDatasetWorkflow:
    return PerDatasetWorkflow(
        {"sums": RLVRWorkflow([one, long], SAMPLING), "words": RLVRWorkflow(one, SAMPLING)}
    )


def run(workflow: PerDatasetWorkflow, dataset: str):
    prompt = Prompt((1, 2), "ask", dataset=dataset)
    runner = EpisodeRunner(workflow, FakeGenerator(), InlineScorer(), CharTokenizer(), 2)
    return run_virtual(runner.run, prompt, Attempt())


def test_each_prompt_is_scored_by_the_rewards_of_its_dataset_under_their_names():
    workflow = make_workflow()
    assert {frozenset(t.rewards) for t in run(workflow, "sums")} == {frozenset({"one", "long"})}
    assert [dict(t.rewards) for t in run(workflow, "words")] == [{"one": 1.0}] * 2
    assert workflow.sampling == SAMPLING
    assert workflow.reward_functions == [one, long]


def test_a_dataset_without_a_workflow_and_workflows_that_sample_differently_are_refused():
    with pytest.raises(ConfigError, match=r"one for the dataset 'verse', got \['sums', 'words'\]"):
        make_workflow().of("verse")
    with pytest.raises(ConfigError, match="`workflows` must hold a workflow for each"):
        PerDatasetWorkflow({})
    with pytest.raises(ConfigError, match="must all have the same `sampling`"):
        PerDatasetWorkflow({"a": RLVRWorkflow(one, SAMPLING), "b": RLVRWorkflow(one)})
