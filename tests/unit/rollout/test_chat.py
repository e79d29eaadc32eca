"""Messages in other people's shapes, and what templates make of messages."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from tokenizers.processors import TemplateProcessing

from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.chat import TemplatedTokenizer, read_content, with_arguments
from lightning_grpo.rollout.prompts import Prompts
from tests.fakes.agents import TOOL_TEMPLATE, make_chat_tokenizer

HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "Yes?"}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
RESULT = {"role": "tool", "tool_call_id": "a", "name": "add", "content": "7"}


def asked(value, template=TOOL_TEMPLATE, **options):
    tokenizer = make_chat_tokenizer(template)
    rows = Prompts([{"q": value}], column="q", **options).load(tokenizer)
    prompt = rows.prompt(0)
    assert prompt.input_ids == tuple(tokenizer.encode(prompt.text, add_special_tokens=False))
    return prompt


@pytest.mark.parametrize(
    "value",
    [
        [HI, YES],
        (HI, YES),
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Yes?"}],
        [{"from": "Human", "value": "hi", "weight": None}, {"role": "gpt", "content": "Yes?"}],
        [{"role": "user", "value": "hi"}, {**YES, "from": None, "value": None, "tool_calls": None}],
        [{**HI, "content": [{"type": "text", "text": "h"}, "i"]}, {**YES, "tool_calls": []}],
        [{**HI, "content": {"type": "text", "text": "hi"}}, YES],
        {"role": ["user", "assistant"], "content": ["hi", "Yes?"]},
        {"from": ["human", "gpt"], "value": ["hi", "Yes?"]},
        json.dumps([HI, YES]),
        " " + json.dumps([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Yes?"}]),
        str([HI, YES]),
        "\n" + str([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Yes?"}]),
        np.array([HI, YES], dtype=object),
        np.array([{**HI, "content": np.array([{"type": "text", "text": "hi"}])}, YES]),
        pa.array([HI, YES]),
        pa.array([[HI, YES]])[0],
        [pa.scalar(HI), pa.scalar(YES)],
    ],
)
def test_messages_are_understood_in_whatever_shape_they_come(value):
    assert read_content(value) == [HI, YES]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (HI, [HI]),
        (json.dumps(HI), [HI]),
        (json.dumps(json.dumps([HI, YES])), [HI, YES]),
        (str(HI), [HI]),
        (
            json.dumps([HI, {"role": "assistant", "tool_calls": [CALL]}, RESULT]),
            [HI, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
        ),
        ([{**HI, "name": "Ann", "id": 3}], [{**HI, "name": "Ann", "id": 3}]),
        ([{"from": "system", "value": "S"}], [{"role": "system", "content": "S"}]),
        ([{"from": "observation", "value": "7"}], [{"role": "tool", "content": "7"}]),
        ([{"role": "environment", "content": "x"}], [{"role": "environment", "content": "x"}]),
        (
            [{"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
        ),
        (
            [{**YES, "tool_calls": [{"name": "add", "arguments": '{"x": 1}'}]}],
            [{**YES, "tool_calls": [{**CALL, "id": None}]}],
        ),
    ],
)
def test_a_message_keeps_what_it_says_and_loses_what_says_nothing(value, expected):
    assert read_content(value) == expected


TEXTS = [
    *("hi", "[1, 2]", "{x}", '[{"a": 1}]', '{"role": "user"}', "[", ""),
    *(
        '"hi"',
        '"[1]"',
        '"[1" is what?',
        '{"messages": "hi"}',
        '{"messages": [1]}',
        "{'a': 1}",
        '{"role": "user", "content": "hi"} Is this JSON valid?',
        '[{"role": "user"}] [1]',
    ),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_is_no_conversation_in_json_stays_text(text):
    assert read_content(text) == text
    assert read_content(np.str_(text)) == text
    assert read_content(pa.scalar(text)) == text


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, r"text or a list of chat messages, got NoneType \(None\)"),
        (float("nan"), r"got float \(nan\)"),
        (3, r"got int \(3\)"),
        ([], "an empty list of chat messages"),
        (["hi"], "got list"),
        ([["user", "hi"]], "got list"),
        ({"messages": [HI]}, r"got a dictionary with the keys \['messages'\].*transform"),
        (json.dumps({"messages": [HI]}), r"a dictionary with the keys \['messages'\].*transform"),
        (json.dumps([HI, {"role": "user", "text": "x"}]), r"message 1 \(user\) has no content"),
        ('[{"role": "user", "content": ', "begins as chat messages in JSON, and can't be read"),
        ('[{"from": "human", "value": "hi"}', "begins as chat messages in JSON"),
        ('[{"role": "user", "content": "hi"},]', "begins as chat messages in JSON"),
        (json.dumps(HI) + "\n" + json.dumps(YES), "begins as chat messages in JSON.*Extra data"),
        (str(np.array([HI, YES])), "as they were printed, which can't be read back"),
        ([{"content": "hi"}], r"message 0 must have a `role` .* got the keys \['content'\]"),
        ([HI, {"speaker": "b", "text": "c"}], r"message 1 must have a `role`"),
        ([{"from": "narrator", "value": "hi"}], "message 0 is from 'narrator', which is none of"),
        ([{"from": "function_call", "value": "{}"}], "from 'function_call'"),
        ([HI, {"role": "assistant", "content": None}], r"message 1 \(assistant\) has no content"),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([{"role": 0, "content": "hi"}], "role of message 0 must be a text, got 0"),
        (
            {"role": ["user", "user"], "content": ["hi"]},
            "must be of one length, got {'role': 2, 'content': 1}",
        ),
        ([{"role": "user", "content": 4}], "only text .* got a part of 'int'"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            r"message 0 \(user\): only text can be a message's content, got a part of 'image'",
        ),
        ([{**YES, "tool_calls": ["add"]}], "every tool call must be an object"),
        ([{**YES, "tool_calls": [{"name": "f", "arguments": "{"}]}], "must be JSON"),
    ],
)
def test_what_is_neither_is_refused_by_name(value, why):
    with pytest.raises(ConfigError, match=why):
        read_content(value)


def test_parts_of_text_are_asked_as_text():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]
    prompt = asked([{"role": "user", "content": parts}], suffix=" Say it.")
    assert prompt.text == (
        "<|im_start|>user\nWhat is 2 + 3? Say it.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.messages == ({"role": "user", "content": "What is 2 + 3? Say it."},)


@pytest.mark.parametrize("begun", ["The answer is", "The answer is ", "4"])
@pytest.mark.parametrize("suffix", [None, "!"])
def test_an_answer_that_was_begun_is_continued(begun, suffix):
    prompt = asked([HI, {"role": "assistant", "content": begun}], suffix=suffix, system="S")
    assert prompt.text == (
        "<|im_start|>system\nS<|im_end|>\n"
        f"<|im_start|>user\nhi{suffix or ''}<|im_end|>\n<|im_start|>assistant\n{begun}"
    )


@pytest.mark.parametrize("blank", ["", " \n"])
def test_an_answer_that_says_nothing_was_not_begun(blank):
    # transformers would cut what stands between the mark of the role and the answer.
    trimmed = TOOL_TEMPLATE.replace("message['content'] }}", "message['content'] | trim }}")
    prompt = asked([HI, {"role": "assistant", "content": blank}], trimmed)
    assert prompt == replace(asked([HI], trimmed), columns=prompt.columns)
    assert prompt.text.endswith("<|im_start|>assistant\n")


def test_a_suffix_stands_behind_what_the_user_said_last():
    result = [HI, {**YES, "tool_calls": [CALL]}, RESULT]
    assert "\nhi!<|im_end|>" in asked(result, suffix="!").text
    with pytest.raises(ConfigError, match=r"`suffix` needs a message of the user .*\['system'\]"):
        asked([{"role": "system", "content": "S"}], suffix="!")


def test_a_tool_call_without_its_result_can_not_be_continued():
    with pytest.raises(ConfigError, match="a tool call of the assistant, which can't be continued"):
        asked([HI, {**YES, "tool_calls": [CALL]}])


def leaving_out(role):
    """The template without the messages of a role."""
    loop = f"{{%- for message in messages if message.role != '{role}' -%}}"
    return TOOL_TEMPLATE.replace("{%- for message in messages -%}", loop)


@pytest.mark.parametrize(
    ("value", "options", "role"),
    [
        # "S" and "7" stand in the text all the same.
        ("Say 7 for S.", {"system": "S"}, "system"),
        ([{"role": "system", "content": "S"}, HI], {}, "system"),
        ([HI, RESULT, {**HI, "content": "7?"}], {}, "tool"),
    ],
)
def test_a_template_that_leaves_a_message_out_is_refused_with_its_role(value, options, role):
    with pytest.raises(ConfigError, match=f"leaves out what the role '{role}' says"):
        asked(value, leaving_out(role), **options)
    asked(value, **options)


def test_a_template_that_leaves_an_empty_result_out_is_refused_with_its_role():
    nothing = [HI, {**YES, "tool_calls": [CALL]}, {**RESULT, "content": ""}]
    with pytest.raises(ConfigError, match="leaves out what the role 'tool' says"):
        asked(nothing, leaving_out("tool"))
    assert "<tool_response></tool_response>" in asked(nothing).text


@pytest.mark.parametrize(
    ("value", "options", "roles"),
    [("hi", {"system": "S"}, "system, user"), ([HI, YES, RESULT], {}, "user, assistant, tool")],
)
def test_a_template_that_refuses_a_role_is_told_with_the_roles_it_was_given(value, options, roles):
    alternates = (
        "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role == 'tool' -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    )
    loop = "{%- for message in messages -%}"
    with pytest.raises(ConfigError, match=f"no messages of the roles {roles}: roles must altern"):
        asked(value, TOOL_TEMPLATE.replace(loop, loop + alternates), **options)


def test_a_template_that_leaves_earlier_answers_out_is_refused():
    with pytest.raises(ConfigError, match="leaves out the assistant's own words"):
        asked([HI, YES, HI], leaving_out("assistant"))


ONLY_PARTS = TOOL_TEMPLATE.replace(
    "message['content'] }}", "(message['content'] | map(attribute='text') | join) }}"
)
JSON_ARGUMENTS = TOOL_TEMPLATE.replace(
    "(call['function'] | tojson)", "call['function']['name'] + ' ' + call['function']['arguments']"
)
HISTORY = [{"role": "system", "content": "S"}, HI, {**YES, "tool_calls": [CALL]}, RESULT, HI]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ONLY_PARTS, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>"),
        (JSON_ARGUMENTS, '<tool_call>add {"x": 1}</tool_call>'),
    ],
)
def test_a_template_is_given_the_form_that_it_says_all_of(template, said):
    prompt = asked([HISTORY[0], HI] if template is ONLY_PARTS else HISTORY, template)
    assert said in prompt.text
    assert all(isinstance(message["content"], str) for message in prompt.messages)


def test_a_template_that_leaves_tool_calls_out_is_refused():
    silent = TOOL_TEMPLATE.replace("message['tool_calls'] or []", "[]")
    called = [HI, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]
    with pytest.raises(ConfigError, match="leaves out a tool call of the role 'assistant'"):
        asked(called, silent)
    assert '"name": "add"' in asked(called).text


@pytest.mark.parametrize(
    "changed",
    [
        ("message['content'] }}", "message['content'] | trim }}"),
        ("message['content'] }}", "message['content'] | tojson }}"),
        ("message['content'] }}", "message['content'].split('</think>')[-1] }}"),
        (
            "{%- for message",
            "{%- if messages[0]['content'] == 'hi' -%}{%- endif -%}{%- for message",
        ),
    ],
)
def test_a_template_that_only_trims_escapes_or_drops_reasoning_is_not_refused(changed):
    template = TOOL_TEMPLATE.replace(*changed)
    history = [{**HI, "content": ' "hi" '}, {**YES, "content": "<think>hm</think>"}, HI]
    assert asked(history, template).messages == tuple(history)


THINKING = TOOL_TEMPLATE + "{%- if enable_thinking is false -%}{{ '<think></think>' }}{%- endif -%}"


def test_template_arguments_reach_the_prompt():
    assert asked("hi", THINKING).text.endswith("assistant\n")
    off = asked("hi", THINKING, template_kwargs={"enable_thinking": False})
    assert off.text.endswith("assistant\n<think></think>")
    assert off.template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("enable_thinkin", "must name what the tokenizer's chat template reads, got 'enable_thin"),
        ("add_generation_prompt", "decided by what is rendered"),
        ("tokenize", "decided by what is rendered"),
    ],
)
def test_template_arguments_that_reach_nothing_are_refused(name, why):
    with pytest.raises(ConfigError, match=f"`template_kwargs` .*{why}"):
        asked("hi", THINKING, template_kwargs={name: False})


def test_template_arguments_need_a_template():
    with pytest.raises(ConfigError, match="`template_kwargs` must name what"):
        asked("hi", None, template_kwargs={"enable_thinking": False})


def test_a_tokenizer_with_arguments_is_the_tokenizer_in_all_else():
    tokenizer = make_chat_tokenizer(THINKING)
    assert with_arguments(tokenizer, {}) is tokenizer
    wrapped = with_arguments(tokenizer, {"enable_thinking": False})
    assert isinstance(wrapped, TemplatedTokenizer)
    assert wrapped.eos_token_id == tokenizer.eos_token_id
    assert wrapped("hi")["input_ids"] == tokenizer("hi")["input_ids"]
    assert len(wrapped) == len(tokenizer)
    assert len(copy.deepcopy(wrapped)) == len(tokenizer)
    assert "think" in wrapped.apply_chat_template([HI], tokenize=False)
    assert "think" not in wrapped.apply_chat_template([HI], tokenize=False, enable_thinking=True)


@pytest.mark.parametrize(
    ("single", "before", "after"),
    [
        ("$A", 0, 0),
        ("$A <|im_end|>", 0, 1),
        ("<|im_start|> $A", 1, 0),
        ("<|im_start|> $A <|im_end|> <|endoftext|>", 1, 2),
    ],
)
@pytest.mark.parametrize("text", ["3 apples", "a", "3<|im_end|>", "aaa"])
def test_without_a_template_a_text_is_begun_but_not_ended(single, before, after, text):
    tokenizer = make_chat_tokenizer(None)
    plain = tokenizer.encode(text)
    marks = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ids = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in marks]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single, special_tokens=ids)
    assert len(tokenizer.encode(text)) == before + len(plain) + after
    prompt = Prompts([{"q": text}], column="q").load(tokenizer).prompt(0)
    assert list(prompt.input_ids) == [ids[0][1]] * before + plain
