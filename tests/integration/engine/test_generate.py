"""`/generate` on a real process: what comes back, and that its logprobs are the model's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import PreTrainedModel

from tests.fakes.engine_process import EngineProcess
from tests.fakes.tiny_model import make_tiny_tokenizer

PROMPT = [10, 40, 99, 7, 300]
LONG = {"max_new_tokens": 1500, "ignore_eos": True}


def full_logprobs(model: PreTrainedModel, ids: list[int], temperature: float) -> torch.Tensor:
    """Logprob of each token after the first, by one pass over the whole sequence."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def sampled(reply: dict) -> list[float]:
    """The logprobs of a reply, checked against its ids."""
    entries = reply["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in entries] == reply["output_ids"]
    assert reply["meta_info"]["output_token_logprobs_length"] == len(entries)
    return [entry[0] for entry in entries]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_a_full_pass_at_the_temperature(
    engine: EngineProcess, reference: PreTrainedModel, temperature: float
) -> None:
    reply = engine.generate(
        PROMPT, sampling={"max_new_tokens": 60, "temperature": temperature, "ignore_eos": True}
    )
    expected = full_logprobs(reference, PROMPT + reply["output_ids"], temperature)
    got = torch.tensor(sampled(reply))
    torch.testing.assert_close(got, expected[len(PROMPT) - 1 :], atol=1e-5, rtol=0)


def test_filters_do_not_change_the_logprobs_that_are_reported(
    engine: EngineProcess, reference: PreTrainedModel
) -> None:
    reply = engine.generate(
        PROMPT,
        sampling={"max_new_tokens": 30, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "ignore_eos": True},
    )
    expected = full_logprobs(reference, PROMPT + reply["output_ids"], 1.0)
    got = torch.tensor(sampled(reply))
    torch.testing.assert_close(got, expected[len(PROMPT) - 1 :], atol=1e-5, rtol=0)


def test_greedy_takes_the_likeliest_tokens(
    engine: EngineProcess, reference: PreTrainedModel
) -> None:
    reply = engine.generate(
        PROMPT, sampling={"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    )
    ids = PROMPT + reply["output_ids"]
    with torch.inference_mode():
        best = reference(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
    assert best[len(PROMPT) - 1 : -1].tolist() == reply["output_ids"]


def test_the_reply_has_every_field_of_sglang(engine: EngineProcess) -> None:
    reply = engine.generate(PROMPT, sampling={"max_new_tokens": 3, "ignore_eos": True}, rid="mine")
    meta = reply["meta_info"]
    assert set(reply) == {"text", "output_ids", "meta_info"}
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(PROMPT), 3)
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]
    assert meta["input_token_logprobs"] == []
    assert meta["num_retractions"] == 0
    assert meta["cached_tokens"] in (0, len(PROMPT))
    assert meta["e2e_latency"] > 0
    assert all(entry[2] is None for entry in meta["output_token_logprobs"])


def test_text_goes_in_and_text_comes_out(engine: EngineProcess) -> None:
    tokenizer = make_tiny_tokenizer()
    text = "Tom has 3 apples"
    sampling = {"max_new_tokens": 8, "temperature": 0}
    by_text = engine.post("/generate", text=text, sampling_params=sampling)
    by_ids = engine.generate(tokenizer(text)["input_ids"], sampling=sampling)
    assert by_text["output_ids"] == by_ids["output_ids"]
    known = [i for i in by_text["output_ids"] if i < len(tokenizer)]
    if known == by_text["output_ids"]:
        assert by_text["text"] == tokenizer.decode(known, skip_special_tokens=True)
    assert "output_token_logprobs" not in by_text["meta_info"]


def test_a_prompt_is_scored_without_generation(
    engine: EngineProcess, reference: PreTrainedModel
) -> None:
    ids = [3, 50, 17, 222, 9, 80]
    reply = engine.generate(
        ids, sampling={"max_new_tokens": 0, "temperature": 0.5}, logprob_start_len=0
    )
    entries = reply["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == ids
    assert entries[0][0] is None
    # Those of the prompt are never divided by the temperature.
    got = torch.tensor([entry[0] for entry in entries[1:]])
    torch.testing.assert_close(got, full_logprobs(reference, ids, 1.0), atol=1e-5, rtol=0)
    assert reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_scoring_starts_where_it_is_told_and_generation_goes_on(
    engine: EngineProcess, reference: PreTrainedModel
) -> None:
    ids = [3, 50, 17, 222, 9, 80]
    reply = engine.generate(
        ids, sampling={"max_new_tokens": 5, "ignore_eos": True}, logprob_start_len=2
    )
    entries = reply["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == ids[2:]
    expected = full_logprobs(reference, ids + reply["output_ids"], 1.0)
    got = torch.tensor([e[0] for e in entries[1:]] + sampled(reply))
    torch.testing.assert_close(got, expected[2:], atol=1e-5, rtol=0)


def test_n_samples_share_the_prompt_and_differ(engine: EngineProcess) -> None:
    prompt = [11, 12, 13, 14, 15, 16]
    replies = engine.generate(
        prompt, sampling={"max_new_tokens": 12, "n": 4, "sampling_seed": 5, "ignore_eos": True}
    )
    assert len({tuple(r["output_ids"]) for r in replies}) == 4
    assert [r["meta_info"]["cached_tokens"] for r in replies] == [0, 6, 6, 6]
    alone = engine.generate(
        prompt, sampling={"max_new_tokens": 12, "sampling_seed": 5, "ignore_eos": True}
    )
    assert alone["output_ids"] == replies[0]["output_ids"]


def test_a_list_of_prompts_is_answered_in_order_with_its_own_parameters(
    engine: EngineProcess,
) -> None:
    prompts = [[5, 6], [7, 8, 9], [10]]
    replies = engine.generate(
        prompts,
        sampling=[{"max_new_tokens": k, "ignore_eos": True} for k in (1, 2, 3)],
        rid=["a", "b", "c"],
    )
    assert [r["meta_info"]["prompt_tokens"] for r in replies] == [2, 3, 1]
    assert [r["meta_info"]["completion_tokens"] for r in replies] == [1, 2, 3]
    assert [r["meta_info"]["id"] for r in replies] == ["a", "b", "c"]


def test_a_list_of_prompts_with_n_is_answered_prompt_by_prompt(engine: EngineProcess) -> None:
    replies = engine.generate([[5, 6], [7, 8, 9]], sampling={"max_new_tokens": 1, "n": 2})
    assert [r["meta_info"]["prompt_tokens"] for r in replies] == [2, 2, 3, 3]


def test_a_stop_token_ends_and_stays_in_the_ids(engine: EngineProcess) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    free = engine.generate(PROMPT, sampling=sampling)["output_ids"]
    stop = free[5]
    reply = engine.generate(
        PROMPT, sampling={"max_new_tokens": 12, "temperature": 0, "stop_token_ids": [stop]}
    )
    assert reply["output_ids"] == free[: free.index(stop) + 1]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_models_own_end_token_ends(engine: EngineProcess) -> None:
    # Every other token is as likely in a random model, so some of many samples end with it.
    replies = engine.generate(PROMPT, sampling={"max_new_tokens": 400, "n": 20, "temperature": 2.0})
    ended = [r for r in replies if r["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended
    for reply in ended:
        assert reply["meta_info"]["finish_reason"]["matched"] == 2
        assert reply["output_ids"][-1] == 2
        assert 2 not in reply["output_ids"][:-1]


def test_no_end_token_comes_before_min_new_tokens(engine: EngineProcess) -> None:
    everything = list(range(512))
    reply = engine.generate(
        PROMPT, sampling={"max_new_tokens": 9, "stop_token_ids": everything[100:]}, rid="short"
    )
    free = reply["meta_info"]["completion_tokens"]
    reply = engine.generate(
        PROMPT,
        sampling={
            "max_new_tokens": 9,
            "min_new_tokens": 6,
            "stop_token_ids": everything[100:],
        },
    )
    assert free < 6
    assert 6 < reply["meta_info"]["completion_tokens"] <= 9
    assert all(token < 100 for token in reply["output_ids"][:6])


def test_a_stop_string_ends_and_is_cut_from_the_text(engine: EngineProcess) -> None:
    tokenizer = make_tiny_tokenizer()
    sampling = {"max_new_tokens": 60, "temperature": 1.0, "sampling_seed": 3, "ignore_eos": True}
    free = engine.generate(PROMPT, sampling=sampling)["output_ids"]
    position = next(i for i, t in enumerate(free) if i > 3 and 260 <= t < 320)
    stop = tokenizer.decode([free[position]])
    reply = engine.generate(PROMPT, sampling=sampling | {"stop": [stop, "never there"]})
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stop not in reply["text"]
    assert len(reply["output_ids"]) <= position + 1
    assert reply["output_ids"] == free[: len(reply["output_ids"])]
    kept = engine.generate(PROMPT, sampling=sampling | {"stop": stop, "no_stop_trim": True})
    assert kept["text"].endswith(stop) or stop in kept["text"]


def test_a_stream_is_cumulative_and_ends_like_the_plain_reply(engine: EngineProcess) -> None:
    sampling = {"max_new_tokens": 10, "sampling_seed": 1, "ignore_eos": True}
    messages = list(engine.stream(input_ids=PROMPT, sampling_params=sampling, return_logprob=True))
    plain = engine.generate(PROMPT, sampling=sampling)
    assert len(messages) == 10
    for earlier, later in itertools.pairwise(messages):
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert earlier["meta_info"]["finish_reason"] is None
        assert "weight_versions" not in earlier["meta_info"]
    assert messages[-1]["output_ids"] == plain["output_ids"]
    assert messages[-1]["text"] == plain["text"]
    assert sampled(messages[-1]) == pytest.approx(sampled(plain), abs=1e-5)
    assert messages[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert messages[-1]["meta_info"]["weight_versions"][0]["end"] == 10


def test_a_stream_of_samples_names_each_by_its_index(engine: EngineProcess) -> None:
    messages = list(engine.stream(input_ids=PROMPT, sampling_params={"max_new_tokens": 3, "n": 2}))
    assert {m["index"] for m in messages} == {0, 1}
    assert sum(m["meta_info"]["finish_reason"] is not None for m in messages) == 2


def test_a_seed_gives_the_same_completion_alone_and_in_a_crowd(engine: EngineProcess) -> None:
    sampling = {"max_new_tokens": 40, "sampling_seed": 77, "ignore_eos": True}
    alone = engine.generate(PROMPT, sampling=sampling)
    crowd = engine.start(
        engine.generate,
        [[i, i + 1, i + 2] for i in range(1, 31)],
        sampling={"max_new_tokens": 300, "ignore_eos": True},
    )
    engine.wait_until(lambda s: s["num_running_reqs"] > 20)
    together = engine.generate(PROMPT, sampling=sampling)
    crowd.result()
    assert together["output_ids"] == alone["output_ids"]
    assert sampled(together) == pytest.approx(sampled(alone), abs=1e-5)


def test_a_seed_continues_identically_from_a_partial_completion(engine: EngineProcess) -> None:
    sampling = {"sampling_seed": 9, "ignore_eos": True, "temperature": 1.0}
    whole = engine.generate(PROMPT, sampling=sampling | {"max_new_tokens": 30})
    start = engine.generate(PROMPT, sampling=sampling | {"max_new_tokens": 13})
    rest = engine.generate(PROMPT + start["output_ids"], sampling=sampling | {"max_new_tokens": 17})
    assert start["output_ids"] + rest["output_ids"] == whole["output_ids"]


def test_requests_without_a_seed_differ(engine: EngineProcess) -> None:
    one, two = (
        engine.generate(PROMPT, sampling={"max_new_tokens": 20, "ignore_eos": True})
        for _ in range(2)
    )
    assert one["output_ids"] != two["output_ids"]


def test_a_short_request_is_admitted_and_answered_while_long_ones_run(
    engine: EngineProcess,
) -> None:
    long = engine.start(engine.generate, [PROMPT] * 4, sampling=LONG)
    engine.wait_until(lambda s: s["num_running_reqs"] == 4)
    short = engine.generate([8, 9], sampling={"max_new_tokens": 4, "ignore_eos": True})
    assert not long.done()
    assert short["meta_info"]["completion_tokens"] == 4
    engine.post("/abort_request", abort_all=True)
    assert len(long.result()) == 4


def test_more_requests_than_slots_are_all_answered(
    engine: EngineProcess, reference: PreTrainedModel
) -> None:
    prompts = [[1 + i, 2 + i, 3 + i][: 1 + i % 3] for i in range(90)]
    replies = engine.generate(
        prompts, sampling=[{"max_new_tokens": 1 + i % 17, "ignore_eos": True} for i in range(90)]
    )
    for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        assert len(reply["output_ids"]) == 1 + index % 17
        expected = full_logprobs(reference, prompt + reply["output_ids"], 1.0)
        got = torch.tensor(sampled(reply))
        torch.testing.assert_close(got, expected[len(prompt) - 1 :], atol=1e-5, rtol=0)
        assert all(math.isfinite(v) for v in sampled(reply))


def test_a_client_that_goes_away_takes_its_request_along(engine: EngineProcess) -> None:
    messages = engine.stream(input_ids=PROMPT, sampling_params=LONG)
    next(messages)
    messages.close()
    engine.wait_until(lambda s: s["num_running_reqs"] == 0)


def test_extra_key_keeps_prompts_apart(engine: EngineProcess) -> None:
    prompt = [21, 22, 23, 24]
    sampling = {"max_new_tokens": 2, "ignore_eos": True}
    first = engine.generate(prompt, sampling=sampling, extra_key="run:1")
    again = engine.generate(prompt, sampling=sampling, extra_key="run:1")
    other = engine.generate(prompt, sampling=sampling, extra_key="run:2")
    cached = [r["meta_info"]["cached_tokens"] for r in (first, again, other)]
    assert cached == [0, 4, 0]
