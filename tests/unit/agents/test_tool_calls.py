"""Calls are read in the form that the tokenizer states."""

from __future__ import annotations

import pytest

from lightning_grpo.agents.tools import reply_parser, strip_specials
from lightning_grpo.errors import ConfigError
from tests.fakes.agents import make_chat_tokenizer
from tests.fakes.tokenizer import CharTokenizer

HERMES = "<tool_call>{}</tool_call>"
TAGGED = "<tool_call><function={{name}}><parameter=...></tool_call>"
LLAMA = 'Respond in the form {"name": ..., "parameters": ...}'
ADD = '{"name": "add", "arguments": {"a": 1, "b": "x"}}'


def parse(template, text):
    return reply_parser(make_chat_tokenizer(template), [])(text)


def test_calls_between_tags_are_read_in_order_and_leave_the_words_around_them():
    reply = parse(HERMES, f"I add. <tool_call>\n{ADD}\n</tool_call>\n<tool_call>{ADD}</tool_call>")
    assert reply.content == "I add."
    assert [(c.name, c.arguments, c.error) for c in reply.calls] == 2 * [
        ("add", {"a": 1, "b": "x"}, "")
    ]


def test_an_answer_without_a_call_stays_as_it_is():
    assert parse(HERMES, " 5 <|") == parse(LLAMA, " 5 <|")
    assert parse(HERMES, " 5 <|").content == " 5 <|"
    assert parse(HERMES, " 5 <|").calls == ()


@pytest.mark.parametrize(
    ("inside", "why"),
    [
        ("{", "not valid JSON"),
        ('{"name": "add"', "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"arguments": {}}', "`name` is missing"),
        ('{"name": 3}', "`name` is missing"),
        ('{"name": "add", "arguments": [1]}', "`arguments` must be an object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(inside, why):
    (call,) = parse(HERMES, f"<tool_call>{inside}</tool_call>").calls
    assert why in call.error
    assert len(call.error) < 500


def test_a_call_that_does_not_end_is_told():
    (call,) = parse(HERMES, f"<tool_call>{ADD}").calls
    assert "`</tool_call>` is missing" in call.error


def test_arguments_may_be_json_in_a_string_or_missing():
    quoted = '{"name": "add", "arguments": "{\\"a\\": 1}"}'
    assert parse(HERMES, f"<tool_call>{quoted}</tool_call>").calls[0].arguments == {"a": 1}
    bare = '<tool_call>{"name": "now"}</tool_call>'
    assert parse(HERMES, bare).calls[0].arguments == {}


def test_functions_and_parameters_in_tags_are_read():
    text = (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>\ntwo words\n</parameter>\n</function>\n</tool_call>"
    )
    (call,) = parse(TAGGED, text).calls
    assert (call.name, call.arguments) == ("add", {"a": 1, "b": "two words"})
    assert "must be `<function=name>`" in parse(TAGGED, "<tool_call>x</tool_call>").calls[0].error


def test_a_whole_answer_may_be_the_call():
    (call,) = parse(LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}').calls
    assert (call.name, call.arguments) == ("add", {"a": 1})


def test_the_tokenizers_own_parser_goes_first():
    class Own(CharTokenizer):
        response_template = "some template"

        def parse_response(self, text, *, prefix, tools):
            assert (prefix, tools) == ("before", [{"t": 1}])
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            return {"role": "assistant", "content": "so", "tool_calls": [call]}

    reply = reply_parser(Own(), [{"t": 1}], prefix="before")("anything")
    assert (reply.content, reply.calls[0].name, reply.calls[0].arguments) == ("so", "add", {"a": 1})


def test_transformers_own_parser_is_spoken_to_as_it_wants():
    tokenizer = make_chat_tokenizer("no form")
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {"close": ["<|im_end|>"]},
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
            },
        },
    }
    reply = reply_parser(tokenizer, [], "<|im_start|>assistant\n")(
        f"So. <tool_call>{ADD}</tool_call>"
    )
    assert [(c.name, c.arguments) for c in reply.calls] == [("add", {"a": 1, "b": "x"})]
    assert reply.content == "So."
    (broken,) = reply_parser(tokenizer, [])("<tool_call>{</tool_call>").calls
    assert "can't be read" in broken.error


def test_a_template_that_knows_no_tools_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"states no form of tool calls.*pass `parse`"):
        parse("{{ messages }}", "x")


def test_the_end_mark_is_no_part_of_the_answer():
    tokenizer = make_chat_tokenizer()
    assert strip_specials(tokenizer, "5<|im_end|>") == "5"
