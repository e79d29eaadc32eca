"""New weights by disk and by a gloo group, whole, in pieces and refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.algorithm.losses import KLPenalty
from lightning_grpo.policy.lora import LoRA
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer
from tests.fakes.user_objects import make_adam
from tests.sglang.engines import REAL
from tests.sglang.scoring import check_sampled, greedy_ids
from tests.sglang.server import Server
from tests.sglang.trainer import Trainer

PROMPT = [10, 40, 99, 7, 300]
TOKENS = 1500  # far from done when a busy machine gets round to the next request
LONG = {"max_new_tokens": TOKENS, "ignore_eos": True}


def greedy(server: Server) -> list[int]:
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    return list(server.generate(PROMPT, sampling=sampling)["output_ids"])


def version(server: Server) -> str:
    return str(server.get("/model_info")["weight_version"])


@pytest.fixture
def trainer(server: Server) -> Iterator[Trainer]:
    trainer = Trainer(server)
    yield trainer
    trainer.close()


@pytest.fixture
def new_weights(other_folder: Path) -> dict[str, torch.Tensor]:
    """The other weights as a checkpoint names them (the tied head once)."""
    return load_file(other_folder / "model.safetensors")


def test_a_folder_is_loaded_and_named(
    server: Server, other_reference: PreTrainedModel, other_folder: Path
) -> None:
    reply = server.post(
        "/update_weights_from_disk", model_path=str(other_folder), weight_version="run:1"
    )
    assert reply == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version updated to run:1.",
        "num_paused_requests": 0,
    }
    assert greedy(server) == greedy_ids(other_reference, PROMPT, 6)
    info = server.get("/model_info")
    assert (info["weight_version"], info["model_path"]) == ("run:1", str(other_folder))


def test_a_folder_that_is_not_there_is_refused_and_the_weights_stay(
    server: Server, reference: PreTrainedModel
) -> None:
    body = {"model_path": "/nowhere/model", "weight_version": "bad"}
    status, reply = server.request("/update_weights_from_disk", body)
    assert (status, reply["success"]) == (400, False)
    assert reply["message"]
    assert greedy(server) == greedy_ids(reference, PROMPT, 6)
    assert version(server) == "default"


def test_without_a_pause_a_folder_waits_for_requests_in_flight(
    server: Server, reference: PreTrainedModel, other_folder: Path
) -> None:
    running = server.launch(PROMPT, sampling=LONG).wait_for(20)
    update = server.start(
        server.post,
        "/update_weights_from_disk",
        model_path=str(other_folder),
        weight_version="v1",
        # SGLang 0.5.19 dies where its scheduler has not yet dropped the request that just ended.
        flush_cache=False,
    )
    reply = running.result()
    assert reply["meta_info"]["weight_versions"] == [
        {"version": "default", "start": 0, "end": TOKENS}
    ]
    check_sampled(reference, PROMPT, reply)
    assert update.result(30)["success"] is True
    assert version(server) == "v1"


def test_a_broadcast_tensor_by_tensor_changes_the_weights(
    trainer: Trainer, new_weights: dict[str, torch.Tensor], other_reference: PreTrainedModel
) -> None:
    status, reply = trainer.send(new_weights, weight_version="run:1")
    assert (status, reply["success"]) == (200, True)
    assert reply["message"] == (
        "Succeeded to update parameter online. Weight version updated to run:1."
    )
    assert greedy(trainer.server) == greedy_ids(other_reference, PROMPT, 6)
    assert version(trainer.server) == "run:1"


@pytest.mark.parametrize("bucket_bytes", [1 << 30, 100_000])
def test_flat_buckets_change_the_weights_and_the_last_one_names_them(
    trainer: Trainer,
    new_weights: dict[str, torch.Tensor],
    other_reference: PreTrainedModel,
    bucket_bytes: int,
) -> None:
    answers = trainer.send_buckets(new_weights, None, bucket_bytes)
    assert (len(answers) == 1) == (bucket_bytes == 1 << 30)
    assert all(status == 200 and reply["success"] for status, reply in answers)
    assert version(trainer.server) == "default"
    trainer.send_buckets(new_weights, "run:2", bucket_bytes)
    assert version(trainer.server) == "run:2"
    assert greedy(trainer.server) == greedy_ids(other_reference, PROMPT, 6)


def test_weights_in_another_dtype_are_cast(
    trainer: Trainer, new_weights: dict[str, torch.Tensor], other_reference: PreTrainedModel
) -> None:
    doubles = {name: tensor.double() for name, tensor in new_weights.items()}
    assert trainer.send_buckets(doubles, "v1")[0][0] == 200
    assert greedy(trainer.server) == greedy_ids(other_reference, PROMPT, 6)


def test_buckets_while_paused_in_place_keep_the_requests(
    trainer: Trainer, new_weights: dict[str, torch.Tensor], reference: PreTrainedModel
) -> None:
    server = trainer.server
    running = [server.launch([*PROMPT, i], sampling=LONG).wait_for(30) for i in range(2)]
    server.post("/pause_generation", mode="in_place")
    assert all(a[0] == 200 for a in trainer.send_buckets(new_weights, "v1", 100_000))
    server.post("/continue_generation")
    for index, request in enumerate(running):
        reply = request.result()
        spans = reply["meta_info"]["weight_versions"]
        assert [s["version"] for s in spans] == ["default", "v1"]
        assert [s["end"] for s in spans] == [spans[1]["start"], TOKENS]
        check_sampled(reference, [*PROMPT, index], reply, span=(0, spans[0]["end"]))


def test_a_group_can_be_left_and_another_joined(
    server: Server, new_weights: dict[str, torch.Tensor], other_reference: PreTrainedModel
) -> None:
    for label in ("v1", "v2"):
        trainer = Trainer(server)
        assert trainer.send_buckets(new_weights, label)[0][0] == 200
        trainer.close()
        assert version(server) == label
    assert greedy(server) == greedy_ids(other_reference, PROMPT, 6)


def test_two_groups_are_apart(server: Server, new_weights: dict[str, torch.Tensor]) -> None:
    first, second = Trainer(server), Trainer(server)
    assert second.send_buckets(new_weights, "v2")[0][0] == 200
    second.close()
    assert first.send_buckets(new_weights, "v1")[0][0] == 200
    first.close()


def test_a_prefix_of_old_weights_is_not_used_after_a_flush(
    trainer: Trainer, new_weights: dict[str, torch.Tensor], other_reference: PreTrainedModel
) -> None:
    server = trainer.server
    prompt = list(range(40, 80))
    sampling = {"max_new_tokens": 10, "ignore_eos": True}
    server.generate(prompt, sampling=sampling)
    server.flush()
    trainer.send_buckets(new_weights, "v1")
    reply = server.generate(prompt, sampling=sampling)
    assert reply["meta_info"]["cached_tokens"] == 0
    check_sampled(other_reference, prompt, reply)


def test_an_extra_key_alone_keeps_prefixes_of_old_weights_apart(
    trainer: Trainer, new_weights: dict[str, torch.Tensor], other_reference: PreTrainedModel
) -> None:
    server = trainer.server
    prompt = list(range(40, 80))
    sampling = {"max_new_tokens": 10, "ignore_eos": True}
    server.generate(prompt, sampling=sampling, extra_key="run:0")
    trainer.send_buckets(new_weights, "v1")
    reply = server.generate(prompt, sampling=sampling, extra_key="run:1")
    check_sampled(other_reference, prompt, reply)


def test_a_wrong_shape_or_name_is_answered_with_a_refusal_and_the_group_stays_in_step(
    trainer: Trainer, new_weights: dict[str, torch.Tensor], other_reference: PreTrainedModel
) -> None:
    server = trainer.server
    wrong = {"model.norm.weight": torch.zeros(63)}
    status, reply = trainer.send(wrong, weight_version="bad")
    assert (status, reply["success"]) == (400, False)
    assert reply["message"]
    assert version(server) == "default"
    assert trainer.send_buckets(new_weights, "v1")[0][0] == 200
    assert greedy(server) == greedy_ids(other_reference, PROMPT, 6)


def test_leaving_a_group_that_was_never_joined_is_refused(server: Server) -> None:
    status, _ = server.request("/destroy_weights_update_group", {"group_name": "nobody"})
    assert status == 400


# -- `/update_weights_from_tensor` as `IPCTransport` writes it, over shared memory of the CPU ------


SEND = """
import json, sys, urllib.request
import torch
from safetensors.torch import load_file
from lightning_grpo.weights.gather import make_buckets
from lightning_grpo.weights.process_group import message_of

url, folder = sys.argv[1:]
torch.multiprocessing.set_sharing_strategy("file_system")
buckets = make_buckets(load_file(folder + "/model.safetensors"), 200_000)
for index, bucket in enumerate(buckets):
    body = {"serialized_named_tensors": [message_of(bucket)], "load_format": "flattened_bucket",
            "flush_cache": False}
    if index == len(buckets) - 1:
        body["weight_version"] = "run:1"
    request = urllib.request.Request(url + "/update_weights_from_tensor", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert json.load(reply)["success"], reply
"""


@pytest.mark.parametrize("shared_server", [REAL], indirect=True, scope="session")
def test_shared_buckets_change_the_weights(
    server: Server, other_folder: Path, other_reference: PreTrainedModel, tmp_path: Path
) -> None:
    log = tmp_path / "send.log"
    with log.open("w") as output:  # a pipe would stay open in the helper
        done = subprocess.run(
            [sys.executable, "-c", SEND, server.url, str(other_folder)],
            cwd=Path(__file__).parents[3],
            stdout=output,
            stderr=output,
            check=False,
        )
    assert done.returncode == 0, log.read_text()
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    reply = server.generate(PROMPT, sampling=sampling)
    assert reply["output_ids"] == greedy_ids(other_reference, PROMPT, 6)
    assert server.get("/model_info")["weight_version"] == "run:1"


# -- a LoRA adapter reaches any server as merged weights -------------------------------------------


def test_the_servers_get_the_merged_weights_and_the_reference_is_the_base(
    server: Server, model_folder: Path, tmp_path: Path
) -> None:
    module = make_module(model_folder, lora=LoRA(rank=4), optimizer=make_adam, kl=KLPenalty(0.1))
    recorder, data = Recorder(), make_data(server.url)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    trainer.fit(module, data)
    assert data.session.report.probe_diff < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    # At the first step the policy is the base; then the adapter leaves it, and it alone.
    kl = [m["policy/kl_reference"] for m in recorder.metrics]
    assert kl[0] == pytest.approx(0.0, abs=1e-7)
    assert max(kl[1:]) > 1e-6
    assert max(m["mismatch/abs_logprob_diff"] for m in recorder.metrics) < 1e-4
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    own = {name.replace(".base_layer", ""): v for name, v in module.policy.model.named_parameters()}
    assert all(torch.equal(own[n], v) for n, v in base.items() if n in own)
