"""Malformed requests are answered 400 naming what is wrong, and hurt nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.fakes.engine_process import EngineProcess
from tests.sglang.scoring import full_logprobs, sampled

OK = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}


def with_sampling(**params: Any) -> dict[str, Any]:
    """A good request but for its sampling parameters."""
    return {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2} | params}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["text", "input_ids"]),
        ({"input_ids": [1], "text": "a"}, ["text", "input_ids"]),
        ({"input_ids": []}, ["input_ids", "empty"]),
        ({"input_ids": [[]]}, ["input_ids[0]", "empty"]),
        ({"text": ""}, ["text", "empty"]),
        ({"text": []}, ["text", "empty"]),
        ({"input_ids": [1, 512]}, ["input_ids[1]", "512"]),
        ({"input_ids": [1, -1]}, ["input_ids[1]", "-1"]),
        ({"input_ids": [1, "a"]}, ["input_ids[1]", "'a'"]),
        ({"input_ids": [1, 2.5]}, ["input_ids[1]", "2.5"]),
        ({"input_ids": [1, [2]]}, ["input_ids[1]", "[2]"]),
        ({"input_ids": [[1], 2]}, ["input_ids[1]"]),
        ({"input_ids": "abc"}, ["input_ids", "'abc'"]),
        (OK | {"sampling_params": {"max_new_tokens": 2046}}, ["2048", "3 + 2046"]),
        ({"input_ids": [1] * 2049}, ["2048", "2049"]),
        (with_sampling(max_new_tokens=-1), ["max_new_tokens", "-1"]),
        (with_sampling(max_new_tokens="many"), ["sampling_params.max_new_tokens", "'many'"]),
        (with_sampling(temperature=-0.5), ["temperature", "-0.5"]),
        (with_sampling(temperature="hot"), ["sampling_params.temperature", "'hot'"]),
        (with_sampling(top_p=0), ["top_p", "0"]),
        (with_sampling(top_p=1.5), ["top_p", "1.5"]),
        (with_sampling(top_k=0), ["top_k", "0"]),
        (with_sampling(top_k=-2), ["top_k", "-2"]),
        (with_sampling(top_k=1.5), ["top_k", "1.5"]),
        (with_sampling(min_p=2), ["min_p", "2"]),
        (with_sampling(n=0), ["`sampling_params.n`", "0"]),
        (with_sampling(min_new_tokens=3), ["min_new_tokens", "3"]),
        (with_sampling(stop_token_ids=[1, 512]), ["stop_token_ids", "512"]),
        (with_sampling(stop_token_ids=1), ["stop_token_ids"]),
        (with_sampling(stop=""), ["stop", "empty"]),
        (with_sampling(stop=["a", ""]), ["stop", "empty"]),
        (with_sampling(sampling_seed="x"), ["sampling_seed"]),
        (with_sampling(temprature=1.0), ["temprature", "temperature"]),
        (with_sampling(repetition_penalty=1.1), ["repetition_penalty", "1.1"]),
        (with_sampling(json_schema="{}"), ["json_schema"]),
        (OK | {"sampling_params": 7}, ["sampling_params", "7"]),
        (OK | {"sampling_params": [{}, {}]}, ["sampling_params", "2 values"]),
        (OK | {"input_ids": [[1], [2]], "sampling_params": [{"n": 2}, {}]}, ["n", "same"]),
        (OK | {"input_ids": [[1], [2]], "rid": ["a", "a"]}, ["rid", "'a'"]),
        (OK | {"input_ids": [[1], [2]], "rid": ["a"]}, ["rid", "1 values"]),
        (OK | {"rid": 5}, ["rid", "5"]),
        (OK | {"return_logprob": True, "logprob_start_len": 3}, ["logprob_start_len", "3"]),
        (OK | {"return_logprob": True, "logprob_start_len": -2}, ["logprob_start_len", "-2"]),
        (OK | {"top_logprobs_num": 2}, ["top_logprobs_num", "2"]),
        (OK | {"return_hidden_states": True}, ["return_hidden_states"]),
        (OK | {"lora_path": "x"}, ["lora_path", "'x'"]),
        (OK | {"stream": "yes"}, ["stream", "'yes'"]),
    ],
)
def test_a_bad_request_names_the_field_and_the_value(
    engine: EngineProcess, body: dict[str, Any], words: list[str]
) -> None:
    status, reply = engine.request("/generate", body)
    assert status == 400
    assert list(reply) == ["error"]
    for word in words:
        assert word in reply["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/pause_generation", {"mode": "sleep"}, "sleep"),
        ("/abort_request", {}, "rid"),
        ("/update_weights_from_disk", {}, "model_path"),
        ("/update_weights_from_disk", {"model_path": 3}, "model_path"),
        ("/update_weight_version", {}, "new_version"),
        ("/destroy_weights_update_group", {"group_name": "nobody"}, "nobody"),
    ],
)
def test_a_bad_command_names_the_field(
    engine: EngineProcess, path: str, body: dict[str, Any], word: str
) -> None:
    status, reply = engine.request(path, body)
    assert status == 400
    assert word in reply["error"]["message"]


def test_null_means_the_default(engine: EngineProcess) -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "ignore_eos")
    engine.post("/generate", **with_sampling(**dict.fromkeys(names)))


def test_a_name_in_flight_is_refused_and_its_owner_goes_on(engine: EngineProcess) -> None:
    sampling = {"max_new_tokens": 1000, "ignore_eos": True}
    running = engine.start(engine.generate, [1, 2], sampling=sampling, rid="mine")
    engine.wait_until(lambda s: s["num_running_reqs"] == 1)
    status, reply = engine.request("/generate", OK | {"rid": "mine"})
    assert status == 400
    assert "mine" in reply["error"]["message"]
    assert len(running.result()["output_ids"]) == 1000


def test_it_says_what_it_is(engine: EngineProcess) -> None:
    info = engine.get("/server_info")
    assert info["version"] == "0.5.19"
    assert "embedded" in info["engine"]
    assert (info["vocab_size"], info["context_length"]) == (512, 2048)
    assert info["max_req_input_len"] == 2047
    assert info["max_total_num_tokens"] == 64 * 2048
    assert engine.get("/model_info") == engine.get("/get_model_info")
    assert engine.get("/model_info")["tokenizer_path"] == str(engine.model)
    assert engine.get("/model_info")["is_generation"] is True


def test_health_answers_without_a_body(engine: EngineProcess) -> None:
    assert engine.request("/health", method="GET") == (200, "")
    assert engine.request("/health_generate", method="GET") == (200, "")
    engine.post("/pause_generation", mode="abort")
    assert engine.request("/health_generate", method="GET") == (200, "")


def test_an_unknown_path_is_not_found(engine: EngineProcess) -> None:
    assert engine.request("/nothing")[0] == 404
    assert engine.request("/generate", method="GET")[0] == 405


# -- what the engine promises of `/generate` beyond what SGLang does (see ../conformance) ----------


PROMPT = [10, 40, 99, 7, 300]
LONG = {"max_new_tokens": 1500, "ignore_eos": True}


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
    got = torch.tensor([e[0] for e in entries[1:]] + sampled(reply).tolist())
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
    torch.testing.assert_close(sampled(together), sampled(alone), atol=1e-5, rtol=0)


def test_a_seed_continues_identically_from_a_partial_completion(engine: EngineProcess) -> None:
    sampling = {"sampling_seed": 9, "ignore_eos": True, "temperature": 1.0}
    whole = engine.generate(PROMPT, sampling=sampling | {"max_new_tokens": 30})
    start = engine.generate(PROMPT, sampling=sampling | {"max_new_tokens": 13})
    rest = engine.generate(PROMPT + start["output_ids"], sampling=sampling | {"max_new_tokens": 17})
    assert start["output_ids"] + rest["output_ids"] == whole["output_ids"]


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
