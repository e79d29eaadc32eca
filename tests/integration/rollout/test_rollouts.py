"""The event loop, the producer, real reward processes and a real tokenizer together."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from lightning_grpo.errors import FailureBudgetError
from lightning_grpo.rewards import gsm8k
from lightning_grpo.rollout.admission import PromptMixture, StalenessGate
from lightning_grpo.rollout.episodes import EpisodeRunner
from lightning_grpo.rollout.ledger import Ledger, RolloutLimits
from lightning_grpo.rollout.producer import RolloutProducer
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.scoring import RewardScorer
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.serving.event_loop import EventLoop
from lightning_grpo.types import Completion, Sampling
from tests.fakes.generator import FakeGenerator
from tests.fakes.rewards_that_fail import hangs_on_some_digits
from tests.fakes.tiny_model import make_tiny_tokenizer

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(20)]


class Calculator(FakeGenerator):
    """Answers right where the seed is even, so groups differ in reward."""

    def __init__(self, tokenizer):
        super().__init__(lambda ids, n: 0.002)
        self.tokenizer = tokenizer

    async def generate(self, input_ids, sampling, *, group_key=None, priority=False, seed=None):
        completion = await super().generate(
            input_ids, sampling, group_key=group_key, priority=priority, seed=seed
        )
        question = self.tokenizer.decode(input_ids)
        number = int(question.partition("What is ")[2].split()[0])
        text = f"#### {2 * number + seed % 2}"
        return Completion(
            completion.token_ids, completion.logprobs, completion.versions, text, "stop"
        )


def open_producer(reward, limits=None):
    tokenizer = make_tiny_tokenizer()
    limits = limits or RolloutLimits(reward_processes=1)
    prompts = Prompts(ROWS, column="question").load(tokenizer, max_prompt_tokens=400)
    workflow = RLVRWorkflow(reward, Sampling(max_new_tokens=8))
    workflow.validate(prompts.columns)
    generator = Calculator(tokenizer)

    @asynccontextmanager
    async def build():
        scorer = RewardScorer(
            workflow.reward_functions, limits.reward_processes, limits.reward_timeout_s
        )
        async with scorer:
            runner = EpisodeRunner(workflow, generator, scorer, tokenizer, 4)
            stream = PromptMixture({"": prompts})
            gate, ledger = StalenessGate(4, 1), Ledger(stream.sizes, 4, limits.max_failed_fraction)
            async with RolloutProducer(stream, runner, gate, ledger, limits) as producer:
                made.append(producer)
                yield

    loop, made = EventLoop(), []
    loop.start(build)
    return loop, made[0], prompts, generator


def test_prompts_become_scored_groups_and_evaluation_runs_beside():
    loop, producer, prompts, generator = open_producer(gsm8k)
    try:
        for version in range(1, 4):
            groups = loop.run(producer.take).result(timeout=30)
            rewards = [t.reward for group in groups for t in group.trajectories]
            assert len(rewards) == 16
            assert set(rewards) == {0.0, 1.0}
            for group in groups:
                ids = group.prompt.input_ids
                assert all(t.input_ids[: len(ids)] == ids for t in group.trajectories)
            evaluation = loop.run(producer.evaluate, prompts, Sampling(temperature=0.0), 2)
            assert len(evaluation.result(timeout=30)) == 20
            generator.version = version
            loop.call(producer.advance, version)
        assert loop.call(producer.state_dict)["ledger"]["counts"] == {"trained": 12}
    finally:
        loop.close()


def train_until_it_ends(loop, producer, generator):
    for version in range(1, 100):
        groups = loop.run(producer.take).result(timeout=60)
        assert {t.reward for group in groups for t in group.trajectories} == {1.0}
        generator.version = version
        loop.call(producer.advance, version)


def test_rewards_that_hang_end_the_run_and_say_so_and_never_count_as_zero():
    limits = RolloutLimits(reward_processes=2, reward_timeout_s=0.2, max_attempts=1)
    loop, producer, _, generator = open_producer(hangs_on_some_digits, limits)
    try:
        with pytest.raises(FailureBudgetError, match="`reward_timeout_s`"):
            train_until_it_ends(loop, producer, generator)
    finally:
        loop.close()
