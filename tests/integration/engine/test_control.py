"""What the engine promises of pauses and updates beyond what SGLang does (see ../conformance)."""

from __future__ import annotations

import http.client
import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fakes.engine_process import EngineProcess

PROMPT = [10, 40, 99, 7, 300]
LONG = {"max_new_tokens": 1500, "ignore_eos": True, "sampling_seed": 4}


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


def test_a_queued_request_is_aborted_with_no_tokens(engine: EngineProcess) -> None:
    engine.post("/pause_generation", mode="in_place")
    held = engine.start(engine.generate, PROMPT, sampling=LONG, rid="held")
    engine.wait_until(lambda s: s["num_waiting_reqs"] == 1)
    engine.post("/abort_request", rid="held")
    reply = held.result()
    assert reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"


def test_an_aborted_completion_continues_as_if_never_stopped(engine: EngineProcess) -> None:
    whole = engine.generate(PROMPT, sampling=LONG)["output_ids"]
    running = engine.start(engine.generate, PROMPT, sampling=LONG)
    engine.wait_until(lambda s: s["num_running_reqs"] == 1)
    engine.post("/abort_request", abort_all=True)
    part = running.result()["output_ids"]
    left = LONG | {"max_new_tokens": len(whole) - len(part)}
    assert part + engine.generate(PROMPT + part, sampling=left)["output_ids"] == whole


def greedy_expected(engine: EngineProcess, folder: Path) -> list[int]:
    """What greedy decoding gives under the weights in `folder`, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


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


def test_a_cached_prompt_is_never_used_under_other_weights(
    engine: EngineProcess, other_folder: Path
) -> None:
    first = greedy(engine)
    engine.post("/update_weights_from_disk", model_path=str(other_folder), flush_cache=False)
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    reply = engine.generate(PROMPT, sampling=sampling)
    assert reply["meta_info"]["cached_tokens"] == 0
    assert reply["output_ids"] == greedy_expected(engine, other_folder) != first
