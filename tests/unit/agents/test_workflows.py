"""Retry with feedback."""

from __future__ import annotations

import anyio
import pytest

from lightning_grpo.agents.tools import ParsedReply, ToolCall, ToolLimits
from lightning_grpo.agents.workflows import MultiTurnWorkflow, ToolWorkflow
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import check_trajectory
from lightning_grpo.types import Prompt, Sampling
from tests.fakes.agents import ScriptedContext, call_text, make_chat_tokenizer, make_prompt
from tests.fakes.tools import add, echo


def right(completion, answer):
    return float(completion == answer)


def hint(completion, answer):
    return f"{completion} is wrong, {answer} would be right."


def play(replies, *, truncated=(), answer="5", **settings):
    tokenizer = make_chat_tokenizer()
    context = ScriptedContext(tokenizer, replies, truncated=truncated)
    workflow = MultiTurnWorkflow(settings.pop("reward", right), **settings)
    trajectory = anyio.run(workflow.run, make_prompt(tokenizer, answer=answer), context)
    return check_trajectory(trajectory, 0), context, tokenizer


def test_a_right_answer_ends_the_episode():
    trajectory, context, _ = play(["5", "6"], turn_discount=0.5)
    assert (trajectory.reward, trajectory.num_turns) == (1.0, 1)
    assert len(context.asked) == 1


def test_a_wrong_answer_is_told_so_and_the_next_one_costs_a_turn():
    trajectory, _context, tokenizer = play(["6", "5"], feedback=hint, turn_discount=0.5)
    assert (trajectory.reward, trajectory.rewards) == (0.5, {"right": 1.0})
    assert (trajectory.num_turns, trajectory.text) == (2, "5")
    text = tokenizer.decode(trajectory.input_ids)
    assert "user\n6 is wrong, 5 would be right.<|im_end|>\n<|im_start|>assistant\n5" in text
    sampled = [t for t, m in zip(trajectory.input_ids, trajectory.response_mask, strict=True) if m]
    assert tokenizer.decode(sampled) == "6<|im_end|>5<|im_end|>"


def test_each_request_begins_with_every_id_of_the_one_before():
    trajectory, context, _ = play(["1", "2", "3"], max_turns=3)
    for before, after in zip(
        context.asked, [*context.asked[1:], trajectory.input_ids], strict=False
    ):
        assert after[: len(before)] == before
        assert len(after) > len(before)


def test_the_turns_are_counted_and_the_last_reward_stands():
    trajectory, _context, _ = play(["1", "2", "3", "5"], max_turns=3, turn_discount=0.9)
    assert (trajectory.num_turns, trajectory.reward) == (3, 0.0)


def test_rewards_see_the_conversation_before_the_answer():
    seen = []

    def reward(completion, messages):
        seen.append([m["content"] for m in messages])
        return 0.0

    play(["1", "2"], reward=reward, retry_text="No.")
    assert seen == [["What is 2 + 3?"], ["What is 2 + 3?", "1", "No."]]


def test_an_answer_that_was_cut_off_gets_no_feedback():
    trajectory, _, _ = play(["6", "5"], truncated=[0])
    assert (trajectory.num_turns, trajectory.truncated) == (1, True)


def test_feedback_may_be_a_coroutine_and_may_have_nothing_to_say():
    async def feedback(completion):
        return None if completion == "7" else "No."

    trajectory, _, _ = play(["6", "7", "5"], feedback=feedback, max_turns=3)
    assert trajectory.num_turns == 2
    with pytest.raises(ConfigError, match="must return a text or None, got 3"):
        play(["6"], feedback=lambda: 3)


def test_no_turn_begins_that_could_not_be_finished():
    first, _, _ = play(["6", "5"])
    room = len(first.input_ids)
    sampling = Sampling(max_new_tokens=8)
    assert play(["6", "5"], sampling=sampling, max_tokens=room - 8)[0].num_turns == 1
    assert play(["6", "5"], sampling=sampling, max_tokens=room + 8)[0].num_turns == 2


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="`max_turns` must be >= 1, got 0"):
        MultiTurnWorkflow(right, max_turns=0)
    with pytest.raises(ConfigError, match="`turn_discount` must be > 0"):
        MultiTurnWorkflow(right, turn_discount=1.5)
    with pytest.raises(ConfigError, match="asks for 'solution'"):
        MultiTurnWorkflow(right, feedback=lambda solution: "").validate(["answer"])
    plain = Prompt((1,), "text")
    context = ScriptedContext(make_chat_tokenizer(), [])
    with pytest.raises(ConfigError, match="prompts are plain text"):
        anyio.run(MultiTurnWorkflow(right).run, plain, context)


def test_an_answer_that_the_prompt_began_is_one_message_of_what_rewards_and_feedback_see():
    seen = []

    def reward(completion, messages):
        seen.append([message["content"] for message in messages])
        return 0.0

    tokenizer = make_chat_tokenizer()
    rows = [{"q": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "It is"}]}]
    prompt = Prompts(rows, column="q").load(tokenizer).prompt(0)
    context = ScriptedContext(tokenizer, [" 6", "5"])
    workflow = MultiTurnWorkflow(reward, retry_text="No.")
    trajectory = anyio.run(workflow.run, prompt, context)
    assert seen == [["2+3?", "It is"], ["2+3?", "It is 6", "No."]]
    assert "assistant\nIt is 6<|im_end|>\n<|im_start|>user\nNo." in tokenizer.decode(
        trajectory.input_ids
    )


# ---- an episode with tools ----------------------------------------------------------------------


def play_with_tools(replies, *, truncated=(), **settings):
    tokenizer = make_chat_tokenizer()
    context = ScriptedContext(tokenizer, replies, truncated=truncated)
    settings.setdefault("limits", ToolLimits(processes=1))
    workflow = ToolWorkflow([add], settings.pop("reward", right), **settings)
    trajectory = anyio.run(workflow.run, make_prompt(tokenizer, answer="5"), context)
    return check_trajectory(trajectory, 0), context, workflow, tokenizer


def test_a_result_is_appended_and_not_trained_on():
    said = call_text("add", '{"a": 2, "b": 3}')
    trajectory, context, workflow, tokenizer = play_with_tools([said, "5"])
    assert trajectory.reward == 1.0
    assert trajectory.rewards == {"right": 1.0, "tool_calls": 1.0, "tool_failures": 0.0}
    assert tokenizer.decode(trajectory.input_ids) == (
        "<|im_start|>system\n<tool_call> add<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
        f"{said}<|im_end|>\n<|im_start|>user\n<tool_response>5</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n5<|im_end|>"
    )
    sampled = [t for t, m in zip(trajectory.input_ids, trajectory.response_mask, strict=True) if m]
    assert tokenizer.decode(sampled) == f"{said}<|im_end|>5<|im_end|>"
    assert workflow.counts.value == 1
    assert trajectory.input_ids[: len(context.asked[1])] == context.asked[1]


def test_an_answer_without_a_call_needs_no_process():
    trajectory, _, workflow, _ = play_with_tools(["5"])
    assert (trajectory.reward, trajectory.num_turns) == (1.0, 1)
    assert vars(workflow.counts) == dict.fromkeys(vars(workflow.counts), 0)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("<tool_call>{</tool_call>", "error: the call can't be read"),
        (call_text("subtract", "{}"), "error: there is no tool 'subtract', only add"),
        (call_text("add", '{"a": 1}'), "error: TypeError: add() missing"),
    ],
)
def test_a_mistake_is_told_to_the_policy_and_counted(said, told):
    trajectory, _, workflow, tokenizer = play_with_tools([said, "5"])
    assert f"<tool_response>{told}" in tokenizer.decode(trajectory.input_ids)
    assert trajectory.rewards["tool_failures"] == 1.0
    assert workflow.counts.raised == 1


def test_what_no_tokenizer_can_read_reaches_the_policy_as_what_it_can():
    tokenizer = make_chat_tokenizer()
    said = call_text("echo", r'{"text": "a\ud800b \ud83d\ude00"}')
    context = ScriptedContext(tokenizer, [said, "5"])
    workflow = ToolWorkflow([echo], right, limits=ToolLimits(processes=1))
    trajectory = anyio.run(workflow.run, make_prompt(tokenizer, answer="5"), context)
    assert "<tool_response>a\ufffdb \U0001f600</tool_response>" in tokenizer.decode(
        trajectory.input_ids
    )


def test_calls_and_turns_have_limits():
    said = call_text("add", '{"a": 2, "b": 3}')
    trajectory, _, workflow, tokenizer = play_with_tools([said * 2, said, "5"], max_calls=2)
    assert "no more than 2 calls" in tokenizer.decode(trajectory.input_ids)
    assert (workflow.counts.value, trajectory.rewards["tool_failures"]) == (2, 1.0)
    trajectory, _, workflow, _ = play_with_tools([said, said, "5"], max_turns=2)
    assert (trajectory.num_turns, workflow.counts.value, trajectory.reward) == (2, 1, 0.0)
    _, _, workflow, _ = play_with_tools([said * 50, "5"], max_calls=3)
    assert workflow.counts.value == 3


def test_an_answer_that_was_cut_off_calls_nothing():
    said = call_text("add", '{"a": 2, "b": 3}')
    trajectory, _, workflow, _ = play_with_tools([said, "5"], truncated=[0])
    assert (trajectory.num_turns, workflow.counts.value) == (1, 0)


def test_no_turn_with_tools_begins_that_could_not_be_finished():
    said = call_text("add", '{"a": 2, "b": 3}')
    sampling = Sampling(max_new_tokens=8)
    trajectory, _, _, _ = play_with_tools([said, "5"], sampling=sampling, max_tokens=20)
    assert trajectory.num_turns == 1
    assert sum(trajectory.response_mask)
    assert trajectory.response_mask[-1]


def test_rewards_see_calls_and_results_before_the_answer():
    seen = []

    def reward(completion, messages):
        seen.append([m["role"] for m in messages])
        return 0.0

    play_with_tools([call_text("add", '{"a": 2, "b": 3}'), "5"], reward=reward)
    assert seen == [["user", "assistant", "tool"]]


def test_the_form_of_calls_may_be_the_users():
    def parse(text):
        calls = (ToolCall("add", {"a": 2, "b": 3}),) if text == "do add" else ()
        return ParsedReply(text, calls)

    trajectory, _, _, _ = play_with_tools(["do add", "5"], parse=parse)
    assert (trajectory.reward, trajectory.num_turns) == (1.0, 2)


def test_settings_of_tools_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="`max_turns` must be >= 1"):
        ToolWorkflow([add], right, max_turns=0)
