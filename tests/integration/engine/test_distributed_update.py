"""Weights broadcast over gloo by a trainer that knows nothing of the engine but its API."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import (
    PrefixStore,
    _new_process_group_helper,
    _world,
)
from transformers import PreTrainedModel

from tests.fakes.engine_process import EngineProcess

PROMPT = [10, 40, 99, 7, 300]


def greedy(engine: EngineProcess) -> list[int]:
    """What the weights in place say."""
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    return list(engine.generate(PROMPT, sampling=sampling)["output_ids"])


def reference_greedy(model: PreTrainedModel) -> list[int]:
    """The same by transformers alone."""
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def one_weight(group_name: str) -> dict[str, Any]:
    """A request that is in order."""
    return {
        "names": ["model.norm.weight"],
        "dtypes": ["float32"],
        "shapes": [[64]],
        "group_name": group_name,
    }


class Trainer:
    """Rank 0 of a group with one engine."""

    def __init__(self, engine: EngineProcess, name: str) -> None:
        self.engine = engine
        self.name = name
        port = free_port()
        joining = engine.start(
            engine.post,
            "/init_weights_update_group",
            master_address="127.0.0.1",
            master_port=port,
            rank_offset=1,
            world_size=2,
            group_name=name,
            backend="gloo",
        )
        timeout = timedelta(seconds=30)
        store = dist.TCPStore("127.0.0.1", port, 2, True, timeout)
        self.store = store
        self.group, _ = _new_process_group_helper(
            2, 0, [], "gloo", PrefixStore(name, store), group_name=name, timeout=timeout
        )
        _world.pg_group_ranks[self.group] = {0: 0, 1: 1}
        assert joining.result()["success"] is True

    def update(self, tensors: dict[str, torch.Tensor], **body: Any) -> tuple[int, Any]:
        """Broadcast a bucket, the request in flight beside it."""
        flat = body.get("load_format") == "flattened_bucket"
        answer = self.engine.start(
            self.engine.request,
            "/update_weights_from_distributed",
            {
                "names": list(tensors),
                "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
                "shapes": [list(t.shape) for t in tensors.values()],
                "group_name": self.name,
            }
            | body,
        )
        if flat:
            pieces = [t.flatten().view(torch.uint8) for t in tensors.values()]
            dist.broadcast(torch.cat(pieces), src=0, group=self.group)
        else:
            for tensor in tensors.values():
                dist.broadcast(tensor, src=0, group=self.group)
        status, reply = answer.result()
        return status, reply

    def close(self) -> None:
        """Leave on both sides."""
        self.engine.post("/destroy_weights_update_group", group_name=self.name)
        dist.destroy_process_group(self.group)
        del self.group  # closes its connection


@pytest.fixture
def trainer(engine: EngineProcess) -> Iterator[Trainer]:
    """A trainer in a group with the engine."""
    trainer = Trainer(engine, "weights")
    yield trainer
    trainer.close()


@pytest.fixture
def new_weights(other_folder: Path) -> dict[str, torch.Tensor]:
    """The other weights as a checkpoint names them (the tied head once)."""
    return load_file(other_folder / "model.safetensors")


def test_buckets_of_several_dtypes_come_one_after_the_other(
    trainer: Trainer,
    new_weights: dict[str, torch.Tensor],
    other_reference: PreTrainedModel,
) -> None:
    names = sorted(new_weights)
    odd = {names[0]: new_weights[names[0]].to(torch.bfloat16)}
    rest = {n: new_weights[n].to(torch.float64) for n in names[1:]}
    assert trainer.update(odd | rest, load_format="flattened_bucket")[0] == 200
    assert trainer.engine.get("/model_info")["weight_version"] == "default"
    exact = {names[0]: new_weights[names[0]]}
    assert trainer.update(exact, weight_version="v2")[0] == 200
    assert greedy(trainer.engine) == reference_greedy(other_reference)


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [("model.norm.bias", [64], "model.norm.bias"), ("model.norm.weight", [63], "shape")],
)
def test_a_wrong_bucket_is_received_and_refused_whole(
    trainer: Trainer,
    new_weights: dict[str, torch.Tensor],
    other_reference: PreTrainedModel,
    load_format: str | None,
    name: str,
    shape: list[int],
    word: str,
) -> None:
    before = greedy(trainer.engine)
    bucket = dict(new_weights)
    bucket[name] = torch.zeros(shape)
    status, reply = trainer.update(bucket, load_format=load_format, weight_version="bad")
    assert (status, reply["success"]) == (400, False)
    assert word in reply["message"]
    assert greedy(trainer.engine) == before
    assert trainer.engine.get("/model_info")["weight_version"] == "default"
    # The group is still in step.
    assert trainer.update(new_weights, load_format=load_format)[0] == 200
    assert greedy(trainer.engine) == reference_greedy(other_reference)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"group_name": "nobody"}, "group_name"),
        ({"dtypes": ["int7"]}, "dtypes"),
        ({"dtypes": ["int64"]}, "dtypes"),
        ({"dtypes": []}, "same length"),
        ({"names": [], "dtypes": [], "shapes": []}, "at least 1"),
        ({"shapes": [[-64]]}, "shapes"),
        ({"load_format": "sharded"}, "load_format"),
        ({"names": 3}, "names"),
    ],
)
def test_a_malformed_bucket_is_refused_before_the_broadcast(
    trainer: Trainer, change: dict[str, Any], word: str
) -> None:
    body = one_weight(trainer.name)
    status, reply = trainer.engine.request("/update_weights_from_distributed", body | change)
    assert status == 400
    assert word in reply["error"]["message"]


def test_a_trainer_that_dies_in_a_broadcast_leaves_the_weights(
    engine: EngineProcess, new_weights: dict[str, torch.Tensor]
) -> None:
    before = greedy(engine)
    trainer = Trainer(engine, "dying")
    body = one_weight("dying") | {"weight_version": "never"}
    answer = engine.start(engine.request, "/update_weights_from_distributed", body)
    dist.destroy_process_group(trainer.group)
    del trainer.group
    status, reply = answer.result()
    assert (status, reply["success"]) == (400, False)
    engine.post("/destroy_weights_update_group", group_name="dying")
    assert greedy(engine) == before


def test_a_group_that_is_left_refuses_the_buckets_that_wait_for_it(engine: EngineProcess) -> None:
    trainer = Trainer(engine, "left")
    body = one_weight("left")
    # The first waits for the trainer's broadcast, the second for the first.
    answers = [
        engine.start(engine.request, "/update_weights_from_distributed", body) for _ in range(2)
    ]
    time.sleep(0.5)  # one that came later would be refused, too
    trainer.close()
    for answer in answers:
        status, reply = answer.result()
        assert status == 400
        assert "'left'" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"backend": "nccl"}, "backend"),
        ({"rank_offset": 0}, "rank_offset"),
        ({"rank_offset": 2}, "rank_offset"),
        ({"master_port": 0}, "master_port"),
        ({"master_port": "x"}, "master_port"),
    ],
)
def test_a_malformed_group_is_refused(
    engine: EngineProcess, change: dict[str, Any], word: str
) -> None:
    body = {
        "master_address": "127.0.0.1",
        "master_port": 1,
        "rank_offset": 1,
        "world_size": 2,
        "backend": "gloo",
    }
    status, reply = engine.request("/init_weights_update_group", body | change)
    assert status == 400
    assert word in reply["error"]["message"]


def test_a_group_is_joined_and_left_once_and_can_be_joined_again(engine: EngineProcess) -> None:
    for _ in range(2):
        trainer = Trainer(engine, "again")
        body = {
            "master_address": "127.0.0.1",
            "master_port": 1,
            "rank_offset": 1,
            "world_size": 2,
            "backend": "gloo",
            "group_name": "again",
        }
        assert engine.request("/init_weights_update_group", body)[0] == 400
        trainer.close()
    assert engine.request("/destroy_weights_update_group", {"group_name": "again"})[0] == 400
