"""What stands between two answers, and the record of an episode."""

from __future__ import annotations

import pytest

from lightning_grpo.agents.turns import EpisodeRecord, call_id, first_ids, next_ids, with_answer
from lightning_grpo.errors import ConfigError, RolloutError
from lightning_grpo.rollout.chat import with_arguments
from lightning_grpo.types import Completion, RouterShape, Routes
from tests.fakes.agents import TOOL_TEMPLATE, make_chat_tokenizer
from tests.fakes.tokenizer import CharTokenizer

ASK = {"role": "user", "content": "What is 2 + 3?"}
SAID = {"role": "assistant", "content": "It is 6."}
MISSED = {"role": "user", "content": "No."}


def completion(tokenizer, text, *, end=True, finish_reason="stop"):
    ids = tokenizer.encode(text) + ([tokenizer.eos_token_id] if end else [])
    return Completion(tuple(ids), (0.0,) * len(ids), (0,) * len(ids), text, finish_reason)


def joined(tokenizer, answer, told, calls=()):
    record = EpisodeRecord().told(first_ids(tokenizer, [ASK])).sampled(answer)
    return tokenizer.decode(record.told(next_ids(tokenizer, answer, told, calls)).input_ids)


@pytest.mark.parametrize("end", [True, False])
def test_appended_ids_read_as_the_template_renders_the_whole_conversation(end):
    tokenizer = make_chat_tokenizer()
    answer = completion(tokenizer, SAID["content"], end=end, finish_reason="stop")
    rendered = tokenizer.apply_chat_template(
        [ASK, SAID, MISSED], tokenize=False, add_generation_prompt=True
    )
    assert joined(tokenizer, answer, [MISSED]) == rendered


def test_an_answer_that_was_cut_off_is_ended_by_what_the_policy_did_not_sample():
    tokenizer = make_chat_tokenizer()
    answer = completion(tokenizer, "It is", end=False, finish_reason="length")
    assert "It is<|im_end|>\n<|im_start|>user\nNo.<|im_end|>" in joined(tokenizer, answer, [MISSED])


@pytest.mark.parametrize("words", ["The answer is", "It is 6."])
def test_an_answer_that_is_begun_for_the_policy_is_continued(words):
    tokenizer = make_chat_tokenizer()
    begun = {"role": "assistant", "content": words}
    text = joined(tokenizer, completion(tokenizer, "It is 6."), [MISSED, begun])
    assert text.endswith(f"No.<|im_end|>\n<|im_start|>assistant\n{words}")
    blank = {"role": "assistant", "content": " "}
    text = joined(tokenizer, completion(tokenizer, "It is 6."), [MISSED, blank])
    assert text.endswith("No.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_an_end_that_was_sampled_is_not_said_twice_whatever_ended_the_answer(finish_reason):
    tokenizer = make_chat_tokenizer()
    answer = completion(tokenizer, "It is", finish_reason=finish_reason)
    assert joined(tokenizer, answer, [MISSED]).count("<|im_end|>") == 3


def test_a_model_that_ends_with_a_mark_of_its_own_is_not_ended_twice():
    tokenizer = make_chat_tokenizer()
    ids = (*tokenizer.encode("It is 6."), tokenizer.pad_token_id)
    answer = Completion(ids, (), (), "It is 6.", "stop")
    text = joined(tokenizer, answer, [MISSED])
    assert "It is 6.<|endoftext|>\n<|im_start|>user" in text


def test_a_template_that_drops_earlier_reasoning_changes_nothing_that_was_sampled():
    drops = TOOL_TEMPLATE.replace(
        "message['role'] + '\n' + message['content']",
        "message['role'] + '\n' + message['content'].split('</think>')[-1]",
    )
    tokenizer = make_chat_tokenizer(drops)
    answer = completion(tokenizer, "<think>hm</think>6")
    assert "<think>hm</think>6<|im_end|>\n<|im_start|>user\nNo." in joined(
        tokenizer, answer, [MISSED]
    )


REFUSES_RESULTS = TOOL_TEMPLATE.replace(
    "{%- for message in messages -%}",
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' and not messages[loop.index0 - 1]['tool_calls'] -%}"
    "{{ raise_exception('a result without its call') }}{%- endif -%}",
)
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
RESULT = {"role": "tool", "name": "f", "tool_call_id": "a", "content": "7"}


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, REFUSES_RESULTS])
def test_tool_results_are_appended_also_where_the_template_wants_their_call_first(template):
    tokenizer = make_chat_tokenizer(template)
    answer = completion(tokenizer, "<tool_call>{}</tool_call>")
    text = joined(tokenizer, answer, [RESULT], [CALL])
    told = "<|im_start|>user\n<tool_response>7</tool_response><|im_end|>"
    assert f"<tool_call>{{}}</tool_call><|im_end|>\n{told}\n<|im_start|>assistant\n" in text


def leaving_out(role):
    loop = f"{{%- for message in messages if message['role'] != '{role}' -%}}"
    return TOOL_TEMPLATE.replace("{%- for message in messages -%}", loop)


@pytest.mark.parametrize(
    ("told", "calls"), [([MISSED], []), ([RESULT], []), ([RESULT], [CALL]), ([RESULT, MISSED], [])]
)
def test_a_template_that_leaves_out_what_is_said_next_is_refused_with_its_role(told, calls):
    role = told[-1]["role"]
    tokenizer = make_chat_tokenizer(leaving_out(role))
    answer = completion(tokenizer, "6 or 7 f?")
    with pytest.raises(ConfigError, match=f"leaves out what the role '{role}' says"):
        next_ids(tokenizer, answer, told, calls)
    assert next_ids(make_chat_tokenizer(), answer, told, calls)


def test_what_a_template_would_say_before_the_answer_is_refused_as_the_next_turn():
    first = "{%- for message in messages if message['role'] == 'system' -%}{{ message['content'] }}"
    tokenizer = make_chat_tokenizer(first + "{%- endfor -%}" + leaving_out("system"))
    told = [{"role": "system", "content": "Be brief."}]
    assert first_ids(tokenizer, [*told, ASK])
    with pytest.raises(ConfigError, match="leaves out what the role 'system' says"):
        next_ids(tokenizer, completion(tokenizer, "x"), told)


def test_a_template_that_says_a_result_only_behind_its_call_is_given_the_call():
    only_with_call = REFUSES_RESULTS.replace(
        "{{ raise_exception('a result without its call') }}", "{%- continue -%}"
    )
    tokenizer = make_chat_tokenizer(only_with_call)
    answer = completion(tokenizer, "<tool_call>{}</tool_call>")
    assert "<tool_response>7</tool_response>" in joined(tokenizer, answer, [RESULT], [CALL])
    with pytest.raises(ConfigError, match="leaves out what the role 'tool'"):
        next_ids(tokenizer, answer, [RESULT])


def test_a_conversation_begins_with_all_that_is_said_or_not_at_all():
    told = [{"role": "system", "content": "S"}, ASK]
    with pytest.raises(ConfigError, match="leaves out what the role 'system' says"):
        first_ids(make_chat_tokenizer(leaving_out("system")), told)
    tokenizer = make_chat_tokenizer()
    begun = tokenizer.decode(first_ids(tokenizer, [ASK, {**SAID, "content": "It is"}]))
    assert begun.endswith("<|im_start|>assistant\nIt is")
    assert first_ids(tokenizer, [ASK, {**SAID, "content": ""}]) == first_ids(tokenizer, [ASK])


def test_a_template_that_leaves_the_tools_out_is_refused_unless_they_are_described():
    silent = make_chat_tokenizer(TOOL_TEMPLATE.replace("{%- if tools -%}", "{%- if false -%}"))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    with pytest.raises(ConfigError, match="leaves out the tool 'add'"):
        first_ids(silent, [ASK], tools)
    assert first_ids(silent, [{"role": "system", "content": "Call add(x)."}, ASK], tools)
    assert first_ids(make_chat_tokenizer(), [ASK], tools)


def test_ids_of_calls_are_what_every_template_takes():
    ids = {call_id(number, index) for number in range(100) for index in range(100)}
    assert len(ids) == 100 * 100
    assert all(len(each) == 9 and each.isalnum() for each in ids)


def test_an_answer_that_was_begun_is_one_message_with_its_end():
    begun = [ASK, {"role": "assistant", "content": "It is"}]
    assert with_answer(begun, " 6.") == [ASK, SAID]
    assert with_answer([ASK], "It is 6.", tool_calls=[CALL]) == [
        ASK,
        {**SAID, "tool_calls": [CALL]},
    ]


def test_template_arguments_reach_the_next_turn():
    thinks = TOOL_TEMPLATE + "{%- if enable_thinking is false -%}{{ '<no>' }}{%- endif -%}"
    tokenizer = make_chat_tokenizer(thinks)
    answer = completion(tokenizer, "x")
    assert "<no>" not in joined(tokenizer, answer, [MISSED])
    silent = with_arguments(tokenizer, {"enable_thinking": False})
    assert joined(silent, answer, [MISSED]).count("<no>") == 2  # also where it begins
    assert joined(silent, answer, [RESULT], [CALL]).endswith("assistant\n<no>")


def test_a_template_that_cannot_say_it_is_a_mistake_of_the_configuration():
    tokenizer = make_chat_tokenizer(REFUSES_RESULTS)
    with pytest.raises(ConfigError, match="a result without its call"):
        next_ids(tokenizer, completion(tokenizer, "x"), [RESULT])
    silent = make_chat_tokenizer("{{ 'always the same' }}")
    with pytest.raises(ConfigError, match="leaves out the assistant's own words"):
        next_ids(silent, completion(silent, "x"), [MISSED])
    with pytest.raises(ConfigError, match="no chat template"):
        first_ids(CharTokenizer(chat=False), [ASK])


def test_only_what_was_sampled_is_masked_in_and_carries_logprobs_and_versions():
    record = EpisodeRecord().told([1, 2])
    record = record.sampled(Completion((3, 4), (-0.1, -0.2), (5, 6), "a", "stop"))
    record = record.told([7]).sampled(Completion((8,), (-0.3,), (9,), "b", "length"))
    trajectory = record.trajectory(0.5, {"right": 0.5}, temperature=0.7)
    assert trajectory.input_ids == (1, 2, 3, 4, 7, 8)
    assert trajectory.response_mask == (False, False, True, True, False, True)
    assert trajectory.logprobs == (0.0, 0.0, -0.1, -0.2, 0.0, -0.3)
    assert trajectory.versions == (-1, -1, 5, 6, -1, 9)
    assert (trajectory.num_turns, trajectory.text, trajectory.truncated) == (2, "b", True)
    assert (trajectory.reward, trajectory.temperature) == (0.5, 0.7)


def test_a_history_that_was_made_anew_is_refused():
    sampled = Completion((3, 4), (0.0, 0.0), (0, 0), "a", "stop")
    again = EpisodeRecord((1, 2, 5, 4), ((2, sampled),))
    with pytest.raises(RolloutError, match=r"tokens 2 to 4 .* not the ids that were sampled"):
        again.trajectory(0.0, {})
    with pytest.raises(RolloutError, match="nothing was sampled"):
        EpisodeRecord((1, 2)).trajectory(0.0, {})


def test_tokens_of_several_turns_keep_the_experts_of_the_turn_that_read_them_first():
    shape = RouterShape(layers=1, top_k=1, experts=64)

    def answer(ids, first, num_read):
        routes = Routes(bytes(range(first, first + num_read)), shape)
        told = (0.0,) * len(ids), (0,) * len(ids)
        return Completion(ids, *told, "", "stop", routes=routes)

    record = EpisodeRecord().told([1, 2]).sampled(answer((3, 4), 0, 3))
    record = record.told([5]).sampled(answer((6, 7), 20, 6))
    assert list(record.trajectory(0.0, {}).routes.experts) == [0, 1, 2, 23, 24, 25]
    unasked = EpisodeRecord().told([1]).sampled(Completion((2,), (0.0,), (0,), "", "stop"))
    assert unasked.trajectory(0.0, {}).routes is None
