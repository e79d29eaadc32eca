from __future__ import annotations

import json
import math
import threading

import anyio
import numpy as np
import pytest

from lightning_grpo.errors import ConfigError, RewardError
from lightning_grpo.rewards.judge import JudgeError
from lightning_grpo.rollout.scoring import (
    BoundReward,
    RewardScorer,
    answer_of,
    is_async,
)
from lightning_grpo.rollout.workflow import try_reward
from lightning_grpo.types import Prompt


def score(reward, scorer=None, /, **arguments):
    scorer = scorer or RewardScorer(processes=0, timeout_s=0.05)

    async def main():
        async with scorer:
            return await scorer.score(reward, arguments)

    return anyio.run(main)


def returning(value):
    return lambda: value


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.bool_(True), np.array(1)])
def test_whatever_is_a_number_becomes_a_float(value):
    scored = score(returning(value))
    assert scored == 1.0
    assert type(scored) is float


def test_the_largest_number_of_fp32_is_a_reward():
    largest = float(np.finfo(np.float32).max)
    assert score(returning({"high": largest, "low": -largest})) == {
        "high": largest,
        "low": -largest,
    }


def test_a_dictionary_is_several_rewards():
    assert score(returning({"right": True, "short": 0.5})) == {"right": 1.0, "short": 0.5}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must return a number, got None"),
        ("1.0", "must return a number, got '1.0'"),
        (math.nan, "must be finite, got nan"),
        (-math.inf, "must be finite, got -inf"),
        ({"a": math.nan}, "must be finite, got nan"),
        (1e39, r"must be finite, also in fp32, got 1e\+39"),
        ({"a": 1.0, "b": -1e39}, r"must be finite, also in fp32, got -1e\+39"),
        (np.float64(4e38), "must be finite, also in fp32"),
        (10**400, "int too large to convert to float"),
        ({}, "must hold a number, got an empty one"),
        ({1: 1.0}, "must have names as keys, got 1"),
        (object(), "must be a string or a real number"),
        (np.array([1.0, 2.0]), "0-dimensional|size-1|only length-1"),
    ],
)
def test_what_is_no_number_is_an_error_never_a_zero(value, message):
    scorer = RewardScorer(processes=0)
    with pytest.raises(RewardError, match=message):
        score(returning(value), scorer)
    assert scorer.counts.failed == 1
    assert scorer.counts.scored == 0


def test_a_list_ends_the_run_with_the_way_out():
    with pytest.raises(ConfigError, match=r"got a list.*rewards\.from_trl"):
        score(returning([1.0]))


def test_a_forgotten_async_ends_the_run():
    async def inner():
        return 1.0

    coroutine = inner()
    assert answer_of(coroutine)[0] == "misuse"
    coroutine.close()


def test_an_in_line_reward_raises_with_its_cause():
    def reward(x):
        return 1 / x

    said = r"reward 'reward' failed: ZeroDivisionError.*in reward: return 1 / x"
    with pytest.raises(RewardError, match=said) as caught:
        score(reward, x=0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_async_rewards_run_on_the_loop_under_the_same_limit():
    class Judge:
        async def __call__(self, seconds):
            await anyio.sleep(seconds)
            return 0.5

    scorer = RewardScorer(processes=0, timeout_s=0.05)
    assert is_async(Judge())
    assert score(Judge(), scorer, seconds=0) == 0.5
    with pytest.raises(RewardError, match=r"reward 'Judge' took longer than `reward_timeout_s`"):
        score(Judge(), scorer, seconds=60)
    assert (scorer.counts.scored, scorer.counts.timed_out) == (1, 1)


def test_columns_may_have_any_name():
    assert score(lambda reward, self, arguments: reward, reward=2.0, self=1, arguments=0) == 2.0


def tried(reward, columns=None):
    """What a trial on a prompt says; None: it may run."""
    prompt = Prompt((1,), "2+2", columns=columns or {"answer": "4"})

    async def play():
        scorer = RewardScorer(processes=0, timeout_s=0.05)
        await try_reward(BoundReward(reward), prompt, scorer.score)

    try:
        return anyio.run(play)
    except ConfigError as error:
        return str(error)


def test_a_reward_that_fails_whatever_is_answered_is_refused_with_its_line():
    def reward(completion, answer):
        return json.loads(answer)["missing"]

    said = tried(reward, {"answer": "{}"})
    assert said.startswith("reward 'reward' failed: KeyError: 'missing' (")
    assert 'in reward: return json.loads(answer)["missing"])' in said
    assert "score --reward" in said
    assert said.count("KeyError") == 1


def test_the_line_that_is_shown_is_the_users_also_where_a_library_raised():
    def reward(completion):
        return json.loads("no json")

    assert "in reward: return json.loads(" in tried(reward)


def test_a_reward_that_some_answers_please_may_run():
    def last_number(completion):
        return float(completion.split()[-1])

    def no_empty_one(completion):
        return 1.0 / len(completion)

    async def unreachable(completion):
        raise JudgeError("no judge there, yet")

    async def slow(completion):
        await anyio.sleep(60)

    assert tried(last_number) is None
    assert tried(no_empty_one) is None
    assert tried(unreachable) is None
    assert tried(slow) is None


def test_a_reward_that_never_gives_a_number_is_refused():
    assert "must return a number, got None" in tried(lambda completion: None)
    assert "from_trl" in tried(lambda completion: [1.0])


def test_a_reward_that_no_other_process_can_have_is_refused_with_the_way_out():
    lock = threading.Lock()

    def guarded(completion: str) -> float:
        with lock:
            return 1.0

    async def main():
        async with RewardScorer([guarded], 1):
            pass

    with pytest.raises(ConfigError, match=r"guarded.*lock") as refused:
        anyio.run(main)
    assert "inside the function" in refused.value.way_out
    assert "`limits.reward_processes`" in refused.value.way_out
