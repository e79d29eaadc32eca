"""Requests put back and read again: exact under the new weights where no old prefix is kept."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.sglang.engines import RETRACTING
from tests.sglang.scoring import check_sampled
from tests.sglang.server import InFlight, Server
from tests.sglang.trainer import Trainer

PROMPT = [10, 40, 99, 7, 300]
TOKENS = 500
LONG = {"max_new_tokens": TOKENS, "ignore_eos": True}

pytestmark = RETRACTING


def check(request: InFlight, prompt: list[int], old: PreTrainedModel, new: PreTrainedModel) -> None:
    """Its first part is of the old weights, the rest of the new."""
    reply = request.result()
    meta = reply["meta_info"]
    assert meta["num_retractions"] == 1
    assert meta["finish_reason"] == {"type": "length", "length": TOKENS}
    assert meta["weight_version"] == "v1"
    first, second = meta["weight_versions"]
    cut = first["end"]
    assert 30 <= cut < TOKENS
    assert first == {"version": "default", "start": 0, "end": cut}
    assert second == {"version": "v1", "start": cut, "end": TOKENS}
    check_sampled(old, prompt, reply, span=(0, cut))
    check_sampled(new, prompt, reply, span=(cut, TOKENS))


def test_a_folder_while_requests_are_retracted(
    server: Server, reference: PreTrainedModel, other_reference: PreTrainedModel, other_folder: Path
) -> None:
    prompts = [[*PROMPT, i] for i in range(3)]
    launched = [server.launch(p, sampling=LONG) for p in prompts]
    running = [request.wait_for(40) for request in launched]
    server.post("/pause_generation", mode="retract")
    assert server.request("/flush_cache")[0] == 400
    server.post(
        "/update_weights_from_disk",
        model_path=str(other_folder),
        weight_version="v1",
        flush_cache=False,
    )
    server.post("/continue_generation")
    for prompt, request in zip(prompts, running, strict=True):
        check(request, prompt, reference, other_reference)


def test_buckets_while_requests_are_retracted(
    server: Server, reference: PreTrainedModel, other_reference: PreTrainedModel, other_folder: Path
) -> None:
    trainer = Trainer(server)
    prompts = [[*PROMPT, i] for i in range(3)]
    launched = [server.launch(p, sampling=LONG) for p in prompts]
    running = [request.wait_for(30) for request in launched]
    server.post("/pause_generation", mode="retract")
    answers = trainer.send_buckets(load_file(other_folder / "model.safetensors"), "v1", 100_000)
    assert all(status == 200 for status, _ in answers)
    server.post("/continue_generation")
    trainer.close()
    for prompt, request in zip(prompts, running, strict=True):
        check(request, prompt, reference, other_reference)
