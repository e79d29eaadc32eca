from __future__ import annotations

import functools

import anyio
import cloudpickle
import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.rewards import from_trl
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.scoring import BoundReward
from lightning_grpo.types import Prompt
from tests.fakes.tokenizer import CharTokenizer

PROMPT = Prompt((1, 2), "2+2=", columns={"answer": "4", "level": 2})
CHAT = Prompt((1, 2), "<user>2+2=", ({"role": "user", "content": "2+2="},), {"answer": "4"})


def call(reward, prompt=PROMPT, completion="4"):
    made = BoundReward(reward)
    made.validate(list(prompt.columns))
    return made, reward(**made.arguments(prompt, completion, [9]))


def test_text_prompts_come_as_text():
    def accuracy(prompts, completions, answer, **kwargs):
        assert (prompts, kwargs["level"], kwargs["trainer_state"]) == (["2+2="], [2], None)
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    made, value = call(from_trl(accuracy))
    assert value == 1.0
    assert made.name == "accuracy"


def test_conversations_come_as_messages_as_in_trl():
    def accuracy(completions, prompts=None, answer=None):
        assert prompts == [[{"role": "user", "content": "2+2="}]]
        return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    assert call(from_trl(accuracy), CHAT)[1] == 1.0


QUESTION = [{"question": "2+2=", "answer": "4"}]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("suffix", [None, "?"])
def test_a_text_column_gives_strings_whatever_template_is_around_it(chat, suffix):
    asked = Prompts(QUESTION, column="question", suffix=suffix)

    def accuracy(prompts, completions, answer, **kwargs):
        assert prompts == [f"2+2={suffix or ''}"]
        return [float(c.endswith(a)) for c, a in zip(completions, answer, strict=True)]

    prompt = asked.make_prompt(QUESTION[0], CharTokenizer(chat))
    assert call(from_trl(accuracy), prompt, "it is 4")[1] == 1.0


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "2+2="}],
        [{"from": "human", "value": "2+2="}],
        '[{"role": "user", "content": "2+2="}]',
    ],
)
def test_a_column_of_messages_gives_conversations_however_they_are_written(value):
    def accuracy(prompts, completions):
        assert prompts == [[{"role": "user", "content": "2+2="}]]
        return [float(completions[0][0]["content"] == "4")]

    row = {"prompt": value}
    assert call(from_trl(accuracy), Prompts([row]).make_prompt(row, CharTokenizer()))[1] == 1.0


def test_what_trl_would_log_is_dropped():
    def accuracy(completions, log_metric, log_extra):
        log_metric("accuracy", 1.0)
        log_extra("seen", completions)
        return [1.0]

    assert call(from_trl(accuracy))[1] == 1.0


def test_an_object_with_an_async_call_stays_async():
    class Judge:
        async def __call__(self, completions):
            return [0.5]

    arguments = BoundReward(from_trl(Judge())).arguments(PROMPT, "4", [9])
    assert anyio.run(lambda: from_trl(Judge())(**arguments)) == 0.5


def test_an_object_and_a_partial_have_the_names_that_they_would_have_alone():
    class Judge:
        def __call__(self, completions):
            return [0.5]

    def longer(completions, than):
        return [float(len(completions[0]) > than)]

    for function in (Judge(), functools.partial(longer, than=3)):
        assert BoundReward(from_trl(function)).name == BoundReward(function).name


def test_token_ids_can_be_asked_for():
    def lengths(completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    assert call(from_trl(lengths))[1] == 1.0


def test_a_column_that_is_not_there_is_refused_as_for_any_reward():
    def accuracy(completions, solution):
        return [1.0]

    with pytest.raises(ConfigError, match="asks for 'solution'"):
        call(from_trl(accuracy))


def test_async_rewards_stay_async():
    async def judge(completions, **kwargs):
        return [0.5 for _ in completions]

    reward = from_trl(judge)
    arguments = BoundReward(reward).arguments(PROMPT, "4", [9])
    assert anyio.run(lambda: reward(**arguments)) == 0.5


def test_two_values_for_one_completion_are_an_error():
    with pytest.raises(ValueError, match="must give one value, got 2"):
        call(from_trl(lambda completions: [1.0, 2.0]))


def test_a_wrapped_function_travels_to_another_process():
    def accuracy(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    reward = cloudpickle.loads(cloudpickle.dumps(from_trl(accuracy)))
    assert call(reward)[1] == 1.0


def test_a_function_of_one_completion_is_refused():
    with pytest.raises(ConfigError, match="A function of one completion is"):
        from_trl(lambda completion, answer: 1.0)
