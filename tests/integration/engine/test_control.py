"""Pausing, aborting and changing weights while requests are in flight."""

from __future__ import annotations

import http.client
import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.fakes.engine_process import EngineProcess

PROMPT = [10, 40, 99, 7, 300]
LONG = {"max_new_tokens": 1500, "ignore_eos": True, "sampling_seed": 4}


def full_logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logprob of each token after the first, by one pass over the whole sequence."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def sampled(reply: dict[str, Any]) -> torch.Tensor:
    """The logprobs of a reply."""
    return torch.tensor([entry[0] for entry in reply["meta_info"]["output_token_logprobs"]])


def launch(engine: EngineProcess, count: int = 3, tokens: int = 60) -> Future[Any]:
    """Put long requests in flight and wait until each has some tokens."""
    before = engine.state()["tokens_sampled"]
    future = engine.start(engine.generate, [PROMPT] * count, sampling=LONG)
    engine.wait_until(lambda s: s["tokens_sampled"] - before > count * tokens)
    return future


def greedy(engine: EngineProcess) -> list[int]:
    """What the weights in place say, which no two random models share."""
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    return list(engine.generate(PROMPT, sampling=sampling)["output_ids"])


def test_abort_request_answers_with_what_there_is(
    engine: EngineProcess, reference: PreTrainedModel
) -> None:
    running = engine.start(engine.generate, PROMPT, sampling=LONG, rid="one")
    engine.wait_until(lambda s: s["num_running_reqs"] == 1)
    engine.post("/abort_request", rid="on")  # a prefix is no name
    assert engine.state()["num_running_reqs"] == 1
    engine.post("/abort_request", rid="one")
    reply = running.result()
    assert reply["meta_info"]["finish_reason"] == {
        "type": "abort",
        "message": "Aborted",
        "status_code": None,
        "err_type": None,
    }
    count = len(reply["output_ids"])
    assert 0 < count < 1500
    assert reply["meta_info"]["weight_versions"] == [
        {"version": "default", "start": 0, "end": count}
    ]
    expected = full_logprobs(reference, PROMPT + reply["output_ids"])[len(PROMPT) - 1 :]
    torch.testing.assert_close(sampled(reply), expected, atol=1e-5, rtol=0)


def test_an_abort_of_an_unknown_request_is_no_error(engine: EngineProcess) -> None:
    assert engine.request("/abort_request", {"rid": "nobody"}) == (200, "")


def test_a_queued_request_is_aborted_with_no_tokens(engine: EngineProcess) -> None:
    engine.post("/pause_generation", mode="in_place")
    held = engine.start(engine.generate, PROMPT, sampling=LONG, rid="held")
    engine.wait_until(lambda s: s["num_waiting_reqs"] == 1)
    engine.post("/abort_request", rid="held")
    reply = held.result()
    assert reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"


def test_an_aborted_completion_continues_as_if_never_stopped(engine: EngineProcess) -> None:
    sampling = LONG | {"max_new_tokens": 400}
    whole = engine.generate(PROMPT, sampling=sampling)["output_ids"]
    running = engine.start(engine.generate, PROMPT, sampling=sampling)
    engine.wait_until(lambda s: s["num_running_reqs"] == 1)
    engine.post("/abort_request", abort_all=True)
    part = running.result()["output_ids"]
    rest = engine.generate(PROMPT + part, sampling=sampling | {"max_new_tokens": 400 - len(part)})[
        "output_ids"
    ]
    assert part + rest == whole


def test_pause_abort_answers_all_at_once_and_holds_the_new(
    engine: EngineProcess, other_folder: Path
) -> None:
    running = launch(engine)
    assert engine.post("/pause_generation") == {
        "message": "Generation paused successfully.",
        "status": "ok",
    }
    for reply in running.result():
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(reply["output_ids"]) == len(sampled(reply)) > 0
    before = greedy_expected(engine, other_folder)
    held = engine.start(greedy, engine)
    engine.wait_until(lambda s: s["num_waiting_reqs"] == 1)
    assert engine.state()["num_running_reqs"] == 0
    assert engine.request("/flush_cache") == (200, "Cache flushed.\n")
    engine.post("/update_weights_from_disk", model_path=str(other_folder), weight_version="v1")
    assert not held.done()
    engine.post("/continue_generation")
    assert held.result() == before


def greedy_expected(engine: EngineProcess, folder: Path) -> list[int]:
    """What greedy decoding gives under the weights in `folder`, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_retract_reads_again_under_the_new_weights(
    engine: EngineProcess,
    other_folder: Path,
    reference: PreTrainedModel,
    other_reference: PreTrainedModel,
) -> None:
    running = launch(engine)
    engine.post("/pause_generation", mode="retract")
    assert engine.state()["num_running_reqs"] == 0
    assert engine.request("/flush_cache")[0] == 400
    engine.post(
        "/update_weights_from_disk",
        model_path=str(other_folder),
        weight_version="v1",
        flush_cache=False,
    )
    engine.post("/continue_generation")
    for reply in running.result():
        meta = reply["meta_info"]
        assert meta["num_retractions"] == 1
        assert meta["finish_reason"] == {"type": "length", "length": 1500}
        assert meta["weight_version"] == "v1"
        first, second = meta["weight_versions"]
        cut = first["end"]
        assert first == {"version": "default", "start": 0, "end": cut}
        assert second == {"version": "v1", "start": cut, "end": 1500}
        ids = PROMPT + reply["output_ids"]
        old = full_logprobs(reference, ids)[len(PROMPT) - 1 :]
        new = full_logprobs(other_reference, ids)[len(PROMPT) - 1 :]
        torch.testing.assert_close(sampled(reply)[:cut], old[:cut], atol=1e-5, rtol=0)
        torch.testing.assert_close(sampled(reply)[cut:], new[cut:], atol=1e-5, rtol=0)


def test_in_place_goes_on_with_the_old_keys_and_values(
    engine: EngineProcess, other_folder: Path, other_reference: PreTrainedModel
) -> None:
    running = launch(engine)
    engine.post("/pause_generation", mode="in_place")
    assert engine.state()["num_running_reqs"] == 3
    engine.post(
        "/update_weights_from_disk",
        model_path=str(other_folder),
        weight_version="v1",
        flush_cache=False,
    )
    engine.post("/continue_generation")
    for reply in running.result():
        meta = reply["meta_info"]
        assert meta["num_retractions"] == 0
        assert [s["version"] for s in meta["weight_versions"]] == ["default", "v1"]
        cut = meta["weight_versions"][1]["start"]
        # The logprobs behind the cut belong to neither set of weights.
        new = full_logprobs(other_reference, PROMPT + reply["output_ids"])[len(PROMPT) - 1 :]
        assert (sampled(reply)[cut : cut + 20] - new[cut : cut + 20]).abs().max() > 1e-3


def test_in_place_refuses_to_flush_and_keeps_the_weights(
    engine: EngineProcess, other_folder: Path
) -> None:
    expected = greedy(engine)
    running = launch(engine)
    engine.post("/pause_generation", mode="in_place")
    status, reply = engine.request(
        "/update_weights_from_disk", {"model_path": str(other_folder), "weight_version": "v1"}
    )
    assert (status, reply["success"]) == (400, False)
    assert "flush_cache" in reply["message"]
    engine.post("/abort_request", abort_all=True)
    engine.post("/continue_generation")
    assert len(running.result()) == 3
    assert greedy(engine) == expected
    assert engine.get("/model_info")["weight_version"] == "default"


def test_a_disk_update_without_pause_waits_for_those_in_flight(
    engine: EngineProcess, other_folder: Path, reference: PreTrainedModel
) -> None:
    running = launch(engine)
    update = engine.start(
        engine.post,
        "/update_weights_from_disk",
        model_path=str(other_folder),
        weight_version="v1",
    )
    for reply in running.result():
        assert [s["version"] for s in reply["meta_info"]["weight_versions"]] == ["default"]
        assert reply["meta_info"]["finish_reason"]["type"] == "length"
    assert update.result() == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version updated to v1.",
        "num_paused_requests": 0,
    }
    info = engine.get("/model_info")
    assert (info["weight_version"], info["model_path"]) == ("v1", str(other_folder))


def test_new_requests_wait_while_an_update_waits(engine: EngineProcess, other_folder: Path) -> None:
    running = launch(engine)
    update = engine.start(
        engine.post, "/update_weights_from_disk", model_path=str(other_folder), weight_version="v1"
    )
    late = None
    while late is None or engine.state()["num_waiting_reqs"] == 0:
        late = late or engine.start(
            engine.generate, PROMPT, sampling={"max_new_tokens": 2, "ignore_eos": True}
        )
        if late.done() or running.done():
            break
    update.result()
    running.result()
    versions = late.result()["meta_info"]["weight_versions"]
    assert [v["version"] for v in versions] in (["v1"], ["default"])


def test_an_update_goes_through_when_its_caller_has_gone(
    engine: EngineProcess, other_folder: Path
) -> None:
    running = launch(engine)
    body = json.dumps({"model_path": str(other_folder), "weight_version": "v1"})
    connection = http.client.HTTPConnection(engine.url.removeprefix("http://"))
    connection.request("POST", "/update_weights_from_disk", body)
    late = engine.start(engine.generate, PROMPT, sampling={"max_new_tokens": 1})
    engine.wait_until(lambda s: s["num_waiting_reqs"] == 1 or running.done())
    connection.close()
    running.result()
    late.result()
    engine.wait_until(lambda s: s["weight_version"] == "v1")


def test_a_broken_folder_leaves_the_weights(
    engine: EngineProcess, other_folder: Path, tmp_path: Path
) -> None:
    expected = greedy(engine)
    broken = tmp_path / "broken"
    shutil.copytree(other_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for folder, word in ((broken, "model.norm.weight"), (tmp_path / "none", "none")):
        status, reply = engine.request(
            "/update_weights_from_disk", {"model_path": str(folder), "weight_version": "v9"}
        )
        assert (status, reply["success"]) == (400, False)
        assert word in reply["message"]
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert engine.request("/update_weights_from_disk", {"model_path": str(broken)})[0] == 400
    assert greedy(engine) == expected
    assert engine.get("/model_info")["weight_version"] == "default"


def test_weights_that_are_not_finite_end_requests_and_not_the_engine(
    engine: EngineProcess, model_folder: Path, tmp_path: Path
) -> None:
    expected = greedy(engine)
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    tensors["model.layers.0.self_attn.v_proj.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    engine.post("/update_weights_from_disk", model_path=str(broken))
    reply = engine.generate(PROMPT, sampling={"max_new_tokens": 5})
    assert reply["output_ids"] == []
    assert "not finite" in reply["meta_info"]["finish_reason"]["message"]
    engine.post("/update_weights_from_disk", model_path=str(model_folder))
    assert greedy(engine) == expected


def test_a_version_alone_can_be_named(engine: EngineProcess) -> None:
    running = launch(engine)
    reply = engine.post("/update_weight_version", new_version="v5", abort_all_requests=False)
    assert (reply["success"], reply["new_version"]) == (True, "v5")
    named_at = engine.state()["tokens_sampled"]
    engine.wait_until(lambda s: s["tokens_sampled"] > named_at + 30)
    engine.post("/abort_request", abort_all=True)
    for reply in running.result():
        assert [s["version"] for s in reply["meta_info"]["weight_versions"]] == ["default", "v5"]


def test_naming_a_version_aborts_unless_told_otherwise(engine: EngineProcess) -> None:
    running = launch(engine)
    engine.post("/update_weight_version", new_version="v5")
    for reply in running.result():
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"


def test_the_cache_is_not_flushed_while_requests_run(engine: EngineProcess) -> None:
    running = launch(engine)
    assert engine.request("/flush_cache", method="GET") == (400, "Flush cache failed.\n")
    engine.post("/abort_request", abort_all=True)
    running.result()
    assert engine.request("/flush_cache", method="GET") == (200, "Cache flushed.\n")


def test_a_cached_prompt_is_never_used_under_other_weights(
    engine: EngineProcess, other_folder: Path
) -> None:
    first = greedy(engine)
    engine.post("/update_weights_from_disk", model_path=str(other_folder), flush_cache=False)
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    reply = engine.generate(PROMPT, sampling=sampling)
    assert reply["meta_info"]["cached_tokens"] == 0
    assert reply["output_ids"] == greedy_expected(engine, other_folder) != first


@pytest.mark.parametrize("path", ["/begin_weight_update", "/end_weight_update", "/weight_version"])
def test_what_that_sglang_lacks_is_not_found(engine: EngineProcess, path: str) -> None:
    assert engine.request(path)[0] == 404
