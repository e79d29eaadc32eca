from __future__ import annotations

import functools
import re

import anyio
import pytest

from lightning_grpo.errors import ConfigError, RewardError, RolloutError
from lightning_grpo.rollout.scoring import BoundReward
from lightning_grpo.rollout.workflow import RLVRWorkflow, check_trajectory, single_turn
from lightning_grpo.types import NO_VERSION, Completion, Prompt, Sampling

PROMPT = Prompt(
    input_ids=(1, 2),
    text="<user>2+2",
    messages=({"role": "user", "content": "2+2"},),
    columns={"answer": "4", "level": 3},
)
COMPLETION = Completion((7, 8, 9), (-0.1, -0.2, -0.3), (0, 0, 1), "it is 4", "length")


class Context:
    """Answers with one completion and scores in-line."""

    tokenizer = None

    def __init__(self):
        self.asked = []

    async def generate(self, input_ids, sampling=None):
        self.asked.append((input_ids, sampling))
        return COMPLETION

    async def score(self, reward, /, **arguments):
        return reward(**arguments)


def run(workflow):
    return anyio.run(workflow.run, PROMPT, Context())


def bound(reward, columns=("answer", "level")):
    made = BoundReward(reward)
    made.validate(columns)
    return made.arguments(PROMPT, COMPLETION.text, COMPLETION.token_ids)


def test_a_reward_gets_only_what_it_names():
    def reward(completion, answer):
        return 1.0

    assert bound(reward) == {"completion": "it is 4", "answer": "4"}


def test_all_that_is_not_a_column_can_be_asked_for():
    def reward(prompt, messages, completion, completions, prompt_ids, completion_ids):
        return 1.0

    assert bound(reward) == {
        "prompt": "<user>2+2",
        "messages": [{"role": "user", "content": "2+2"}],
        "completion": "it is 4",
        "completions": "it is 4",
        "prompt_ids": [1, 2],
        "completion_ids": [7, 8, 9],
    }


def test_the_function_of_areals_guide_runs_unchanged():
    def reward(prompt, completions, prompt_ids, completion_ids, answer, **kwargs):
        return float(kwargs["level"])

    assert run(RLVRWorkflow(reward)).reward == 3.0


def test_keyword_arguments_receive_all_columns_and_a_default_may_stand():
    def reward(completion, scale=2.0, **columns):
        return scale * columns["level"]

    assert bound(reward) == {"completion": "it is 4", "answer": "4", "level": 3}
    assert run(RLVRWorkflow(reward)).reward == 6.0


def test_objects_partials_and_classes_methods_are_rewards_with_a_name():
    class Judge:
        def __call__(self, completion):
            return 1.0

        def grade(self, completion):
            return 1.0

    def by_words(completion, words):
        return 1.0

    made = [BoundReward(r) for r in (Judge(), Judge().grade, functools.partial(by_words, words=1))]
    assert [reward.name for reward in made] == ["Judge", "grade", "by_words"]
    assert bound(functools.partial(by_words, words=1)) == {"completion": "it is 4"}


def test_an_argument_that_nothing_provides_is_refused_with_what_there_is():
    workflow = RLVRWorkflow(lambda completion, solution: 1.0)
    with pytest.raises(ConfigError, match=r"asks for 'solution'.*\['answer', 'level'\].*'prompt'"):
        workflow.validate(["answer", "level"])


def test_a_column_that_hides_a_reserved_name_is_refused():
    with pytest.raises(ConfigError, match=r"column 'completion' hides .* Rename it"):
        RLVRWorkflow(lambda completion: 1.0).validate(["answer", "completion"])


def test_positional_only_arguments_and_what_cannot_be_called_are_refused():
    def reward(completion, /):
        return 1.0

    with pytest.raises(ConfigError, match="positional-only argument 'completion'"):
        RLVRWorkflow(reward)
    with pytest.raises(ConfigError, match="must be callable, got 3"):
        RLVRWorkflow([3])
    with pytest.raises(ConfigError, match="at least one function"):
        RLVRWorkflow([])


def test_weights_must_match_and_names_must_differ():
    with pytest.raises(ConfigError, match="one weight for each of the 1 rewards, got 2"):
        RLVRWorkflow(lambda completion: 1.0, reward_weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match=r"rewards' names \['right'\], got \['wrong'\]"):
        RLVRWorkflow({"right": right}, reward_weights={"wrong": 1.0})


def test_names_are_made_to_differ():
    class Judge:
        def __call__(self, completion):
            return 4.0

    by = functools.partial(lambda completion, words: 1.0 * words, words=2)
    rewards = [lambda completion: 1.0, lambda completion: 2.0, by, Judge(), Judge()]
    found = run(RLVRWorkflow(rewards))
    assert found.rewards == {
        "lambda": 1.0, "lambda_2": 2.0, "lambda_3": 2.0, "Judge": 4.0, "Judge_2": 4.0
    }  # fmt: skip
    assert found.reward == 13.0


def test_rewards_are_named_by_a_dictionary_and_weighted_by_name():
    rewards = {"right": lambda completion: 1.0, "it's short": lambda completion: 2.0}
    workflow = RLVRWorkflow(rewards, reward_weights={"it's short": 0.5, "right": 3.0})
    found = run(workflow)
    assert found.rewards == {"right": 1.0, "it_s_short": 2.0}
    assert found.reward == 4.0
    with pytest.raises(ConfigError, match="got an empty dictionary"):
        RLVRWorkflow({})


@pytest.mark.parametrize("name", ["<lambda>", "a/b", "a b", "50%", "ü", "\n", "", "a:b", "~x~"])
def test_a_name_is_legal_for_every_logger(name):
    def reward(completion):
        return {name: 1.0, "other": 2.0}

    reward.__name__ = name
    named = [bound.name for bound in RLVRWorkflow([reward, reward]).rewards]
    named += list(run(RLVRWorkflow(reward)).rewards)
    assert all(re.fullmatch(r"[\w.-]+", each) for each in named)
    assert len(set(named[:2])) == 2


def right(completion, answer):
    return float(answer in completion)


def shape(completion):
    return {"short": 1.0, "polite": 0.5}


def test_several_rewards_are_weighted_and_each_stays_under_its_name():
    trajectory = run(RLVRWorkflow([right, shape], reward_weights=[2.0, 0.1]))
    assert trajectory.rewards == {"right": 1.0, "short": 1.0, "polite": 0.5}
    assert trajectory.reward == pytest.approx(2.15)


def test_two_rewards_of_one_name_are_told_apart_also_when_one_is_in_a_dictionary():
    def short(completion):
        return 3.0

    found = run(RLVRWorkflow([shape, short, shape]))
    assert found.rewards == {
        "short": 1.0, "polite": 0.5, "short_2": 3.0, "shape_2_short": 1.0, "shape_2_polite": 0.5
    }  # fmt: skip


def test_token_ids_are_joined_and_aligned_and_never_made_again():
    trajectory = run(RLVRWorkflow(right, Sampling(temperature=0.5)))
    assert trajectory.input_ids == (1, 2, 7, 8, 9)
    assert trajectory.response_mask == (False, False, True, True, True)
    assert trajectory.logprobs == (0.0, 0.0, -0.1, -0.2, -0.3)
    assert trajectory.versions == (NO_VERSION, NO_VERSION, 0, 0, 1)
    assert trajectory.truncated
    assert trajectory.temperature == 0.5
    assert trajectory.num_response_tokens == 3


def test_a_trajectory_without_a_sampled_token_or_with_ragged_fields_is_refused():
    empty = Completion((), (), (), "", "abort")
    with pytest.raises(RolloutError, match="no sampled token"):
        check_trajectory(single_turn(PROMPT, empty, 0.0, {}), 0)
    ragged = Completion((7, 8), (-0.1,), (0, 0), "", "stop")
    with pytest.raises(RolloutError, match="differ in length: 4, 4, 3, 4"):
        check_trajectory(single_turn(PROMPT, ragged, 0.0, {}), 0)
    broken = Completion((7,), (float("-inf"),), (0,), "", "stop")
    with pytest.raises(RolloutError, match="not finite"):
        check_trajectory(single_turn(PROMPT, broken, 0.0, {}), 0)


@pytest.mark.parametrize(
    ("reward", "rewards", "message"),
    [
        (1e39, {}, r"a trajectory's reward is 1e\+39, which is no number in fp32"),
        (float("inf"), {}, "a trajectory's reward is inf"),
        (0.0, {"a": 1.0, "b": float("nan")}, "a trajectory's reward 'b' is nan"),
        (0.0, {"a": -1e39}, "a trajectory's reward 'a' is -1e"),
    ],
)
def test_a_reward_that_fp32_cannot_hold_fails_also_in_a_workflow_of_ones_own(
    reward, rewards, message
):
    with pytest.raises(RewardError, match=message):
        check_trajectory(single_turn(PROMPT, COMPLETION, reward, rewards), 0)


def test_a_weighted_sum_that_fp32_cannot_hold_fails():
    workflow = RLVRWorkflow(lambda completion: 1e38, reward_weights=[10.0])
    with pytest.raises(RewardError, match="no number in fp32"):
        check_trajectory(run(workflow), 0)
