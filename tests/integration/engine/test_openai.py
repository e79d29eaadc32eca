"""OpenAI's endpoints of the engine, as the real `openai` client calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.fakes.engine_process import EngineProcess

openai = pytest.importorskip("openai", reason="needs the extra [openai]")

ASKED: dict[str, Any] = {
    "model": "any",
    "messages": [{"role": "user", "content": "What is 2 plus 3?"}],
    "max_tokens": 12,
    "temperature": 0.7,
    "seed": 5,
}
GO_ON = {"extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(engine: EngineProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="-", max_retries=0) as made:
        yield made


def test_the_model_that_is_served_is_listed(client, engine):
    (model,) = client.models.list().data
    assert model.id == str(engine.model)
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


def test_a_chat_is_what_generate_says_to_the_rendered_messages(client, engine):
    tokenizer = AutoTokenizer.from_pretrained(engine.model)
    reply = client.chat.completions.create(**ASKED, **GO_ON, logprobs=True)
    ids = tokenizer.apply_chat_template(
        ASKED["messages"], add_generation_prompt=True, return_dict=False
    )
    sampling = {"max_new_tokens": 12, "temperature": 0.7, "sampling_seed": 5, "ignore_eos": True}
    same = engine.generate(ids, sampling=sampling)
    (choice,) = reply.choices
    assert choice.message.content == same["text"]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 12)
    assert usage.total_tokens == len(ids) + 12
    told = [each.logprob for each in choice.logprobs.content]
    assert told == [entry[0] for entry in same["meta_info"]["output_token_logprobs"]]


def test_a_streamed_chat_says_the_same_piece_by_piece(client):
    whole = client.chat.completions.create(**ASKED, **GO_ON, n=2, logprobs=True)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = list(client.chat.completions.create(**ASKED, **GO_ON, n=2, logprobs=True, **options))
    assert events[-1].usage == whole.usage
    for index, choice in enumerate(whole.choices):
        parts = [each for event in events for each in event.choices if each.index == index]
        assert len(parts) > 2
        assert "".join(part.delta.content for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
        tokens = [each for part in parts for each in part.logprobs.content]
        assert tokens == choice.logprobs.content


def test_completions_take_texts_and_ids_and_stream(client, engine):
    ids = [[10, 40, 99], [7, 300]]
    options = {"model": "any", "prompt": ids, "n": 2, "max_tokens": 6, "seed": 3, **GO_ON}
    whole = client.completions.create(**options, logprobs=0)
    texts = [choice.text for choice in whole.choices]
    sampling = {"max_new_tokens": 6, "n": 2, "sampling_seed": 3, "ignore_eos": True}
    assert texts == [each["text"] for each in engine.generate(ids, sampling=sampling)]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [len(choice.logprobs.token_logprobs) for choice in whole.choices] == [6] * 4
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 24)
    told = [""] * 4
    for event in client.completions.create(**options, stream=True):
        for choice in event.choices:
            told[choice.index] += choice.text
    assert told == texts
    one = client.completions.create(model="any", prompt="2+3=", temperature=0)
    assert one.usage.completion_tokens <= 16  # OpenAI's default
    assert client.completions.create(model="any", prompt=["2+3="], temperature=0).choices == (
        one.choices
    )


def test_what_begins_a_stop_string_is_not_streamed_before_it_is_known(client):
    plain = client.chat.completions.create(**{**ASKED, "max_tokens": 40}, **GO_ON)
    stop = plain.choices[0].message.content[5:9]
    options = {**ASKED, **GO_ON, "max_tokens": 40, "stop": [stop]}
    whole = client.chat.completions.create(**options).choices[0]
    parts = [event.choices[0] for event in client.chat.completions.create(**options, stream=True)]
    assert whole.finish_reason == parts[-1].finish_reason == "stop"
    assert "".join(part.delta.content for part in parts) == whole.message.content
    assert stop not in whole.message.content


def test_parts_of_text_are_read_as_their_text(client):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 plus 3?"}]
    asked = {**ASKED, "messages": [{"role": "user", "content": parts}]}
    said = client.chat.completions.create(**asked)
    assert said.choices == client.chat.completions.create(**ASKED).choices


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "`tools` are not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 3}, "`top_logprobs` is not supported"),
        ({"max_tokens": 100_000}, "must fit in the context"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_can_t_be_served_is_refused_by_its_name(client, asked, said):
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**{**ASKED, **asked})


def test_a_reader_who_leaves_frees_the_engine(client, engine):
    options = {**ASKED, "max_tokens": 400}
    with client.chat.completions.create(**options, **GO_ON, stream=True) as events:
        next(iter(events))
    engine.wait_until(lambda state: state["num_running_reqs"] == 0)
