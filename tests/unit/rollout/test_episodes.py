from __future__ import annotations

import inspect
from dataclasses import replace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.errors import ConfigError, RolloutError
from lightning_grpo.rollout.episodes import Attempt, EpisodeRunner, derive_seed, for_evaluation
from lightning_grpo.rollout.workflow import PerDatasetWorkflow, RLVRWorkflow, single_turn
from lightning_grpo.serving.event_loop import Background, ClosedError
from lightning_grpo.types import NO_VERSION, Prompt, Sampling, Trajectory
from tests.fakes.agents import TOOL_TEMPLATE, make_chat_tokenizer
from tests.fakes.generator import FakeGenerator, InlineScorer
from tests.fakes.tokenizer import CharTokenizer
from tests.fakes.virtual_time import run_virtual

PROMPT = Prompt((1, 2), "ask", row=5, pass_index=1)


class TwoTurns:
    """Asks twice, at a temperature of its own."""

    async def run(self, prompt, context):
        first = await context.generate(list(prompt.input_ids), Sampling(temperature=0.7))
        ids = [*prompt.input_ids, *first.token_ids]
        second = await context.generate(ids, Sampling(temperature=0.7))
        reward = await context.score(lambda reward, self: reward, reward=0.5, self=None)
        return single_turn(prompt, second, reward, {"r": reward})


def run(workflow, attempt=None, generator=None, size=3):
    generator = generator or FakeGenerator()
    runner = EpisodeRunner(workflow, generator, InlineScorer(), CharTokenizer(), size, seed=9)
    attempt = attempt or Attempt()
    trajectories = run_virtual(runner.run, PROMPT, attempt)
    return generator, attempt, trajectories


@given(path=st.lists(st.integers(-1, 10**9), min_size=1, max_size=6))
def test_a_seed_is_the_same_every_time_and_fits_a_signed_32_bit_field(path):
    assert derive_seed(*path) == derive_seed(*path)
    assert 0 <= derive_seed(*path) < 2**31
    assert derive_seed(*path) != derive_seed(*path, 0)


def test_every_turn_of_every_episode_has_a_seed_of_its_own():
    generator, _, _ = run(TwoTurns())
    assert len({request["seed"] for request in generator.requests}) == 6
    again, _, _ = run(TwoTurns())
    assert [r["seed"] for r in again.requests] == [r["seed"] for r in generator.requests]
    later, _, _ = run(TwoTurns(), Attempt(draw=2))
    assert not {r["seed"] for r in later.requests} & {r["seed"] for r in generator.requests}


def test_a_trajectory_has_the_temperature_that_its_tokens_were_sampled_at():
    _, attempt, trajectories = run(TwoTurns())
    assert {trajectory.temperature for trajectory in trajectories} == {0.7}
    assert attempt.num_tokens == 3 * 2 * 3
    _, _, greedy = run(TwoTurns(), Attempt(sampling=Sampling(temperature=0.0)))
    assert {trajectory.temperature for trajectory in greedy} == {0.0}


class InSettings(TwoTurns):
    """Says by name how to sample."""

    async def run(self, prompt, context):
        said = await context.generate(prompt.input_ids, {"temperature": 0.7})
        return single_turn(prompt, said, 0.5, {"r": 0.5})


def test_a_call_may_name_its_settings_and_is_checked_as_any_other():
    _, _, trajectories = run(InSettings())
    assert {trajectory.temperature for trajectory in trajectories} == {0.7}


class Echo(TwoTurns):
    """Says that it has two turns, and tells the policy something between them."""

    async def run(self, prompt, context):
        first = await super().run(prompt, context)
        return replace(first, num_turns=2)


def test_the_turns_of_a_trajectory_can_be_read():
    _, _, trajectories = run(Echo())
    sampled = [chr(i) for i in trajectories[0].input_ids[len(PROMPT.input_ids) :]]
    assert trajectories[0].transcript == "".join(sampled)
    _, _, trajectories = run(TwoTurns())
    assert {trajectory.transcript for trajectory in trajectories} == {""}


class Asks:
    """Asks once for each of some samplings, each with what came before."""

    sampling = Sampling(max_new_tokens=9)

    def __init__(self, *asked, **kwargs):
        self.asked, self.kwargs = asked, kwargs

    async def run(self, prompt, context):
        ids, mask = list(prompt.input_ids), [False] * len(prompt.input_ids)
        for sampling in self.asked:
            completion = await context.generate(ids, sampling, **self.kwargs)
            ids = [*ids, *completion.token_ids]
            mask += [True] * len(completion.token_ids)
        logprobs = [-1.0 * m for m in mask]
        versions = [0 if m else NO_VERSION for m in mask]
        return Trajectory(
            *map(tuple, (ids, mask, logprobs, versions)), 0.5, {}, "", truncated=False
        )


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ([Sampling(top_p=0.5)], r"`sampling.top_p` must be 1.0 in training .* got 0.5"),
        ([Sampling(top_k=5)], "`sampling.top_k` must be -1"),
        ([Sampling(min_new_tokens=1)], "`sampling.min_new_tokens` must be 0"),
        ([Sampling(temperature=0.0)], "`sampling.temperature` must be > 0"),
        ([Sampling(temperature=1e-7)], "`sampling.temperature` must be > 0"),
        ([Sampling(), Sampling(top_p=0.9)], "`sampling.top_p` must be 1.0"),
        (
            [Sampling(temperature=0.7), None],
            "`sampling.temperature` must be the same .* 0.7 and 1.0",
        ),
    ],
)
def test_a_call_that_cannot_be_trained_on_as_it_is_sampled_is_refused_where_it_stands(asked, rule):
    line = inspect.getsourcelines(Asks.run)[1] + 3
    place = rf"`context.generate` in .*test_episodes.py, line {line} \(run\): {rule}"
    with pytest.raises(ConfigError, match=place):
        run(Asks(*asked))
    for attempt in (Attempt(priority=True), Attempt(sampling=Sampling(temperature=0.0))):
        run(Asks(*asked), attempt)  # nothing is trained on it


class JudgesItself(Asks):
    """A second call, greedy, whose tokens are no part of the trajectory."""

    async def run(self, prompt, context):
        trajectory = await super().run(prompt, context)
        ids = [*trajectory.input_ids, 7]
        await context.generate(ids, Sampling(max_new_tokens=1, temperature=0.0), trained=False)
        return trajectory


class ComparesWithGreedy(Asks):
    """A greedy answer to the same prompt, as a baseline; it may be the sampled one's beginning."""

    async def run(self, prompt, context):
        greedy = Sampling(max_new_tokens=2, temperature=0.0)
        self.baseline = await context.generate(list(prompt.input_ids), greedy, trained=False)
        return await super().run(prompt, context)


class SameTokens(FakeGenerator):
    """Answers a request of two tokens with two of those that it answers others with."""

    async def generate(self, input_ids, sampling, **kwargs):
        made = await super().generate(input_ids, sampling, **kwargs | {"seed": 0})
        n = min(sampling.max_new_tokens, 3)
        return replace(made, token_ids=made.token_ids[:n], logprobs=made.logprobs[:n],
            versions=made.versions[:n])  # fmt: skip


def test_a_call_beside_the_trajectory_may_come_to_the_same_tokens():
    workflow = ComparesWithGreedy(Sampling(temperature=0.7))
    _, _, trajectories = run(workflow, generator=SameTokens())
    assert trajectories[0].input_ids[2:4] == workflow.baseline.token_ids
    assert {(t.temperature, t.length_limit) for t in trajectories} == {(0.7, 512)}


def test_evaluation_leaves_calls_beside_the_trajectory_as_they_are():
    generator, _, _ = run(JudgesItself(None), Attempt(sampling=Sampling(temperature=0.6)))
    assert {r["sampling"].temperature for r in generator.requests} == {0.6, 0.0}


def test_a_call_beside_the_trajectory_may_be_sampled_in_any_way_and_leaves_no_mark():
    _, attempt, trajectories = run(JudgesItself(Sampling(max_new_tokens=8, temperature=0.7)))
    assert {(t.temperature, t.length_limit) for t in trajectories} == {(0.7, 8)}
    assert attempt.num_tokens == 3 * 2 * 3
    with pytest.raises(ConfigError, match="must not hold what was sampled with `trained=False`"):
        run(Asks(Sampling(), trained=False))


class SaysWhatItReads(Asks):
    """Keeps what the template makes of a message."""

    async def run(self, prompt, context):
        self.read = context.tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
        return await super().run(prompt, context)


def test_a_prompts_template_arguments_are_those_of_its_episodes():
    tokenizer = make_chat_tokenizer(TOOL_TEMPLATE + "{{ 'short' if be_short }}")
    for kwargs, said in (({}, False), ({"be_short": True}, True)):
        workflow = SaysWhatItReads(None)
        runner = EpisodeRunner(workflow, FakeGenerator(), InlineScorer(), tokenizer, 1)
        prompt = replace(PROMPT, template_kwargs=kwargs)
        run_virtual(runner.run, prompt, Attempt())
        assert ("short" in tokenizer.decode(workflow.read["input_ids"])) == said


def test_a_call_without_sampling_is_sampled_as_the_workflow_says():
    generator, _, _ = run(Asks(None))
    assert {r["sampling"] for r in generator.requests} == {Sampling(max_new_tokens=9)}


OWN = Sampling(max_new_tokens=64, stop=("a",))
WANTED = Sampling(max_new_tokens=128, temperature=0.6, top_p=0.95, stop=("b",))


@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [
        (OWN, OWN, WANTED),
        (Sampling(max_new_tokens=5), None, WANTED),
        (replace(OWN, max_new_tokens=16), OWN, replace(WANTED, max_new_tokens=16)),
        (replace(OWN, max_new_tokens=512), OWN, WANTED),
        (replace(OWN, stop=("a", "b", "c")), OWN, replace(WANTED, stop=("b", "c"))),
        (replace(OWN, stop_token_ids=(3,)), OWN, replace(WANTED, stop_token_ids=(3,))),
        (replace(OWN, temperature=0.1), OWN, WANTED),
    ],
)
def test_evaluation_samples_in_its_own_way_and_ends_where_a_call_asks_for_it(asked, own, expected):
    assert for_evaluation(asked, own, WANTED) == expected


def test_a_trajectory_knows_how_long_its_last_completion_could_have_been():
    _, _, trajectories = run(TwoTurns(), Attempt(sampling=Sampling(max_new_tokens=9)))
    assert {trajectory.length_limit for trajectory in trajectories} == {9}


def test_the_first_failure_ends_the_other_episodes_and_is_what_is_raised():
    generator = FakeGenerator(
        lambda ids, n: 1.0 + n, fail=lambda n: OSError("first") if n == 0 else None
    )
    with pytest.raises(OSError, match="first"):
        run(TwoTurns(), generator=generator)
    assert generator.cancelled == 2


def test_the_background_keeps_its_first_error_and_does_not_cancel_who_entered_it():
    async def fail(message, after):
        await anyio.sleep(after)
        raise ConfigError(message)

    async def main():
        async with Background() as background:
            background.spawn(fail, "late", 2)
            background.spawn(fail, "early", 1)
            await anyio.sleep(10)
            with pytest.raises(ConfigError, match="early"):
                background.check()
        with pytest.raises(RolloutError, match="not running"):
            background.spawn(fail, "never", 1)
        return True

    assert run_virtual(main)


def test_an_error_of_the_body_leaves_the_background_as_it_is():
    async def main():
        async with Background() as background:
            background.spawn(anyio.sleep, 100)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_virtual(main)


def test_leaving_the_background_tells_who_comes_later():
    async def main():
        async with Background() as background:
            pass
        background.check()

    with pytest.raises(ClosedError):
        run_virtual(main)


# ---- a workflow of its own for each dataset -----------------------------------------------------

SAMPLING = Sampling(max_new_tokens=8)


def long(completion: str) -> float:
    return float(len(completion))


def one(completion: str) -> float:
    return 1.0


def make_workflow() -> PerDatasetWorkflow:
    return PerDatasetWorkflow(
        {"sums": RLVRWorkflow([one, long], SAMPLING), "words": RLVRWorkflow(one, SAMPLING)}
    )


def run_all(workflow: PerDatasetWorkflow, dataset: str):
    prompt = Prompt((1, 2), "ask", dataset=dataset)
    runner = EpisodeRunner(workflow, FakeGenerator(), InlineScorer(), CharTokenizer(), 2)
    return run_virtual(runner.run, prompt, Attempt())


def test_each_prompt_is_scored_by_the_rewards_of_its_dataset_under_their_names():
    workflow = make_workflow()
    assert {frozenset(t.rewards) for t in run_all(workflow, "sums")} == {frozenset({"one", "long"})}
    assert [dict(t.rewards) for t in run_all(workflow, "words")] == [{"one": 1.0}] * 2
    assert workflow.sampling == SAMPLING
    assert workflow.reward_functions == [one, long]


def test_a_dataset_without_a_workflow_and_workflows_that_sample_differently_are_refused():
    with pytest.raises(ConfigError, match=r"one for the dataset 'verse', got \['sums', 'words'\]"):
        make_workflow().of("verse")
    with pytest.raises(ConfigError, match="`workflows` must hold a workflow for each"):
        PerDatasetWorkflow({})
    with pytest.raises(ConfigError, match="must all have the same `sampling`"):
        PerDatasetWorkflow({"a": RLVRWorkflow(one, SAMPLING), "b": RLVRWorkflow(one)})
