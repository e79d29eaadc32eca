"""What the engine promises of `/generate` beyond what SGLang does (see ../conformance)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tests.fakes.engine_process import EngineProcess
from tests.sglang.scoring import full_logprobs, sampled

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
