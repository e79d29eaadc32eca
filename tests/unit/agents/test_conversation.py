"""Requests of an agent become ids that continue what was sampled, or are refused."""

from __future__ import annotations

import pytest

from lightning_grpo.agents.conversation import BadRequest, HistoryError, Recorder, read_request
from lightning_grpo.errors import RolloutError
from lightning_grpo.types import Completion, Sampling
from tests.fakes.agents import TOOL_TEMPLATE, call_text, make_chat_tokenizer

SAMPLING = Sampling(max_new_tokens=32)
SYSTEM = {"role": "system", "content": "Be short."}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


class Talk:
    """An agent's side of a recorder."""

    def __init__(self, conversations="one", template=TOOL_TEMPLATE):
        self.tokenizer = make_chat_tokenizer(template)
        self.recorder = Recorder(self.tokenizer, conversations)

    def ask(self, messages, answer="yes", *, truncated=False, **body):
        request = read_request({"messages": messages, **body}, SAMPLING)
        record = self.recorder.begin(request)
        end = [] if truncated else [self.tokenizer.eos_token_id]
        ids = (*self.tokenizer.encode(answer), *end)
        completion = Completion(
            ids, (-1.0,) * len(ids), (0,) * len(ids), answer, "length" if truncated else "stop"
        )
        return self.recorder.end(request, record, completion)

    @property
    def text(self):
        return self.tokenizer.decode(self.recorder.last.record.input_ids)


def test_a_conversation_grows_as_the_template_would_render_it():
    talk = Talk()
    history = [SYSTEM, user("a")]
    for turn in range(3):
        history += [talk.ask(history, f"answer {turn}"), user(f"more {turn}")]
    rendered = talk.tokenizer.apply_chat_template(history[:-1], tokenize=False)
    assert talk.text + "\n" == rendered
    assert talk.recorder.last.record.trajectory(0.0, {}).num_turns == 3
    assert talk.recorder.num_discarded == 0


def test_ids_are_those_that_were_sampled_whatever_the_text_would_be_tokenized_to():
    talk = Talk()
    request = read_request({"messages": [user("a")]}, SAMPLING)
    ids = tuple(i for character in "apples" for i in talk.tokenizer.encode(character))
    assert ids != tuple(talk.tokenizer.encode("apples"))
    record = talk.recorder.begin(request)
    message = talk.recorder.end(
        request, record, Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "apples", "stop")
    )
    again = talk.recorder.begin(
        read_request({"messages": [user("a"), message, user("b")]}, SAMPLING)
    )
    start = len(record.input_ids)
    assert again.input_ids[start : start + len(ids)] == ids


@pytest.mark.parametrize(
    "history",
    [
        [user("a"), said("changed"), user("b")],
        [user("changed"), said("yes"), user("b")],
        [SYSTEM, user("a"), said("yes"), user("b")],
        [user("b")],
        [user("a"), user("b")],
    ],
)
def test_a_history_that_was_changed_is_refused_with_the_place(history):
    talk = Talk()
    talk.ask([user("a")])
    with pytest.raises(HistoryError, match=r"message \d is not what was said: recorded .*, got"):
        talk.ask(history)


def test_the_message_names_what_was_said_and_what_came():
    talk = Talk()
    talk.ask([user("a")], "yes")
    with pytest.raises(HistoryError, match=r"message 1 .*'yes'.*'no'"):
        talk.ask([user("a"), said("no"), user("b")])


def test_answers_that_the_policy_did_not_give_are_refused():
    talk = Talk()
    answer = talk.ask([user("a")])
    with pytest.raises(HistoryError, match="an answer that the policy did not give"):
        talk.ask([user("a"), answer, user("b"), said("me"), user("c")])
    with pytest.raises(HistoryError, match="nothing was said to it"):
        talk.ask([user("a"), answer])
    with pytest.raises(HistoryError, match="`tools` changed"):
        talk.ask([user("a"), answer, user("b")], tools=TOOLS)


def test_examples_in_the_first_request_are_part_of_the_prompt():
    talk = Talk()
    shots = [user("1"), said("one"), user("2")]
    answer = talk.ask(shots, "two")
    talk.ask([*shots, answer, user("3")], "three")
    trajectory = talk.recorder.last.record.trajectory(0.0, {})
    assert trajectory.num_turns == 2


def test_a_question_that_is_sent_once_more_is_answered_anew_and_the_first_answer_told():
    talk = Talk()
    talk.ask([user("a")], "first")
    answer = talk.ask([user("a")], "second")
    talk.ask([user("a"), answer, user("b")], "third")
    assert "second" in talk.text
    assert "first" not in talk.text
    assert (talk.recorder.num_answers, talk.recorder.num_discarded) == (3, 1)


def test_an_agent_may_begin_anew_where_that_is_allowed():
    talk = Talk("last")
    talk.ask([user("a")])
    answer = talk.ask([user("b")], "other")
    talk.ask([user("b"), answer, user("c")], "end")
    assert "a<|im_end|>" not in talk.text
    assert (talk.recorder.last.record.trajectory(0, {}).num_turns) == 2
    assert talk.recorder.num_discarded == 1
    with pytest.raises(HistoryError, match="is not what was said"):
        talk.ask([user("b"), said("changed"), user("c")])


def test_tool_calls_come_as_messages_and_their_results_are_appended():
    talk = Talk()
    called = call_text("add", '{"a": 1}')
    answer = talk.ask([user("a")], called, tools=TOOLS)
    (call,) = answer["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {"a": 1}}
    sent = {**call, "function": {"name": "add", "arguments": '{"a":1}'}}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "7"}
    back = {"role": "assistant", "content": None, "tool_calls": [sent], "refusal": None}
    talk.ask([user("a"), back, result], "7", tools=TOOLS)
    assert f"{called}<|im_end|>\n<|im_start|>user\n<tool_response>7</tool_response>" in talk.text


def test_half_a_call_stays_text():
    talk = Talk()
    half = "<tool_call>{"
    assert talk.ask([user("a")], half, tools=TOOLS) == {"role": "assistant", "content": half}
    assert talk.ask([user("a")], call_text("add", "{}"), tools=TOOLS, truncated=True)["content"]


def test_an_agent_that_never_asked_is_told():
    with pytest.raises(RolloutError, match="without a call of the policy"):
        _ = Talk().recorder.last


def test_a_request_may_stop_earlier_but_not_sample_otherwise():
    body = {
        "messages": [user("a")],
        "max_tokens": 8,
        "stop": "\n",
        "temperature": 0.1,
        "top_p": 0.5,
    }
    sampling = read_request(body, SAMPLING).sampling
    assert sampling == Sampling(max_new_tokens=8, stop=("\n",))
    assert read_request({**body, "max_tokens": 999}, SAMPLING).sampling.max_new_tokens == 32


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ([], "`messages` must be a list"),
        ({"messages": []}, "must not be empty"),
        ({"messages": ["a"]}, "an object with a `role`"),
        ({"messages": [user("a")], "n": 2}, "`n` must be 1"),
        ({"messages": [user("a")], "tool_choice": "required"}, "`tool_choice` must be auto"),
        ({"messages": [user("a")], "response_format": {"type": "json_object"}}, "must be text"),
        ({"messages": [user("a")], "presence_penalty": 1.0}, "`presence_penalty` is not served"),
        ({"messages": [user("a")], "logprobs": True}, "`logprobs` are not served"),
        (
            {"messages": [user("a")], "chat_template_kwargs": {"enable_thinking": False}},
            r"`chat_template_kwargs` .* Set `Prompts.template_kwargs`",
        ),
        ({"messages": [user([{"type": "image_url"}])]}, "only text"),
        ({"messages": [{"role": "assistant", "tool_calls": ["a"]}]}, "with a `function`"),
    ],
)
def test_what_is_not_served_is_refused(body, why):
    with pytest.raises(BadRequest, match=why):
        read_request(body, SAMPLING)


def test_text_in_parts_is_text_and_a_developer_is_the_system():
    parts = {
        "role": "developer",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    (message,) = read_request({"messages": [parts]}, SAMPLING).messages
    assert message == {"role": "system", "content": "ab"}
