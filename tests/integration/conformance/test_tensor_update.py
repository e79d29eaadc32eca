"""`/update_weights_from_tensor` as `IPCTransport` writes it, over shared memory of the CPU.

The real server only: on a CPU it can map nothing but files, so the sharing strategy is torch's
`file_system`, in a process of its own because that starts a helper which outlives the call. By CUDA
IPC, which is what the transport is for, it is measured on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.sglang.engines import REAL
from tests.sglang.scoring import greedy_ids
from tests.sglang.server import Server

PROMPT = [10, 40, 99, 7, 300]
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
