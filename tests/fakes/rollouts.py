"""A producer put together from fakes."""

from __future__ import annotations

from lightning_grpo.rollout.admission import PromptMixture, StalenessGate
from lightning_grpo.rollout.episodes import EpisodeRunner
from lightning_grpo.rollout.ledger import Ledger, RolloutLimits
from lightning_grpo.rollout.producer import RolloutProducer
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.types import Sampling
from tests.fakes.generator import FakeGenerator, InlineScorer
from tests.fakes.tokenizer import CharTokenizer


def reward_by_length(completion: str) -> float:
    return float(len(completion) % 7)


def make_stream(num_rows=50, shuffle=True, seed=0, curriculum=None, make_prompt=None):
    rows = [{"question": f"question {i}", "answer": str(i)} for i in range(num_rows)]
    prompts = Prompts(rows, column="question", shuffle=shuffle, seed=seed)
    return PromptMixture({"": prompts.load(CharTokenizer(), make_prompt)}, curriculum, seed)


def make_producer(
    generator: FakeGenerator | None = None,
    *,
    batch_size=4,
    max_staleness=1,
    max_groups=None,
    policy="wait",
    group_size=2,
    num_rows=50,
    reward=reward_by_length,
    workflow=None,
    limits=None,
    keep_group=None,
    seed=0,
    events=None,
    curriculum=None,
    make_prompt=None,
):
    """`events`: a list that receives (name, data) of every event."""
    limits = limits or RolloutLimits()
    runner = EpisodeRunner(
        workflow or RLVRWorkflow(reward, Sampling(max_new_tokens=8)),
        generator or FakeGenerator(),
        InlineScorer(),
        CharTokenizer(),
        group_size=group_size,
        seed=seed,
    )
    return RolloutProducer(
        make_stream(num_rows, curriculum=curriculum, make_prompt=make_prompt),
        runner,
        StalenessGate(batch_size, max_staleness, max_groups, policy),
        Ledger([num_rows], batch_size, limits.max_failed_fraction),
        limits,
        keep_group=keep_group,
        on_event=None if events is None else lambda name, **data: events.append((name, data)),
    )
