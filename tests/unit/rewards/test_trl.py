from __future__ import annotations

import anyio
import cloudpickle
import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.rewards import from_trl
from lightning_grpo.rollout.binding import BoundReward
from lightning_grpo.types import Prompt

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
