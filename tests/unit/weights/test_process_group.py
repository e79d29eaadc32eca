import asyncio
import base64
import io
import pickle
from multiprocessing import resource_sharer
from types import SimpleNamespace

import pytest
import torch

from lightning_grpo.errors import ConfigError, WeightSyncError
from lightning_grpo.weights.gather import make_buckets
from lightning_grpo.weights.process_group import DirectTransport, IPCTransport, message_of
from lightning_grpo.weights.transport import Place
from tests.fakes.weight_group import join_group

pytestmark = pytest.mark.anyio

ALLOWED = ("builtins", "collections", "multiprocessing", "torch", "types")
"""Modules of the names that SGLang's reader lets a message use."""


@pytest.fixture(autouse=True)
def no_sharing_thread():
    """CPU tensors are shared by a thread that serves their descriptors; GPU tensors need none."""
    yield
    resource_sharer.stop(timeout=5)


class Anything(SimpleNamespace):
    """Stands for whatever a message builds."""

    def __init__(self, *arguments, **options):
        super().__init__()


def names_in(message):
    """Every (module, name) that reading the message looks up."""
    found = []

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            found.append((module, name))
            return Anything

    Reader(io.BytesIO(base64.b64decode(message))).load()
    return found


def test_a_message_names_nothing_that_the_server_refuses():
    (bucket,) = make_buckets({"a": torch.ones(3), "b": torch.zeros(2, 2)}, 1 << 20)
    names = names_in(message_of(bucket))
    assert names
    assert all(module.partition(".")[0] in ALLOWED for module, _ in names)


class Client:
    url = "http://server"

    def __init__(self, success=True):
        self.bodies = []
        self.success = success

    async def update(self, path, body=None, timeout_s=60.0):
        assert path == "/update_weights_from_tensor"
        self.bodies.append(body)
        return SimpleNamespace(success=self.success, message="no")


def bound(tmp_path):
    transport = IPCTransport()
    transport.bind(Place(tmp_path, tmp_path, bucket_bytes=16))
    assert transport.prepare({"a": torch.ones(4), "b": torch.ones(4)}, 1) == 32
    return transport


async def test_the_label_goes_with_the_last_bucket(tmp_path):
    transport = bound(tmp_path)
    client = Client()
    target = SimpleNamespace(client=client, url=client.url, tp_size=1)
    await transport.send(target, "run:1", 5.0)
    await transport.close([])
    assert [body.get("weight_version") for body in client.bodies] == [None, "run:1"]
    assert all(body["load_format"] == "flattened_bucket" for body in client.bodies)
    assert all(body["flush_cache"] is False for body in client.bodies)


async def test_a_server_of_several_gpus_is_refused(tmp_path):
    transport = bound(tmp_path)
    target = SimpleNamespace(client=Client(), url="http://server", tp_size=2)
    with pytest.raises(ConfigError, match="ProcessGroupTransport"):
        await transport.send(target, "run:1", 5.0)


class OnTheTrainersGPU:
    """A server that joins a group and whose NCCL then refuses: it is on the trainer's own GPU."""

    url = "http://127.0.0.1:1"

    def __init__(self, joins=True):
        self.joins = joins
        self.asked = []
        self.labels = []

    async def update(self, path, body=None, timeout_s=60.0):
        self.asked.append(path)
        if path == "/init_weights_update_group" and self.joins:
            await asyncio.get_running_loop().run_in_executor(None, join_group, body)
        elif path in ("/init_weights_update_group", "/update_weights_from_distributed"):
            words = "NCCL error: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 60"
            return SimpleNamespace(success=False, message=words)
        if path == "/update_weights_from_tensor":
            self.labels.append(body.get("weight_version"))
        return SimpleNamespace(success=True, message="")


@pytest.fixture
def direct(tmp_path):
    transport = DirectTransport("gloo")
    transport.bind(Place(tmp_path, tmp_path, bucket_bytes=16))
    return transport


async def test_a_running_server_that_turns_out_to_share_the_gpu_gets_the_weights_by_ipc(direct):
    client = OnTheTrainersGPU()
    target = SimpleNamespace(client=client, url=client.url, tp_size=1, alive=True)
    for version in (1, 2):
        direct.prepare({"a": torch.ones(4), "b": torch.ones(4)}, version)
        await direct.send(target, f"run:{version}", 5.0)
    assert client.labels == [None, "run:1", None, "run:2"]
    # It is asked by NCCL once, and what was left of the group is taken down.
    assert client.asked.count("/update_weights_from_distributed") == 1
    assert client.asked.count("/destroy_weights_update_group") == 1
    # A server that failed may come back on another GPU: it is asked again.
    await direct.abandon(target)
    await direct.send(target, "run:3", 5.0)
    assert client.asked.count("/update_weights_from_distributed") == 2
    assert client.labels[-1] == "run:3"
    await direct.close([target])


async def test_a_server_of_several_gpus_that_shares_one_is_told_so(direct):
    client = OnTheTrainersGPU(joins=False)
    target = SimpleNamespace(client=client, url=client.url, tp_size=2, alive=True)
    direct.prepare({"a": torch.ones(4)}, 1)
    with pytest.raises(WeightSyncError, match="Duplicate GPU"):
        await direct.send(target, "run:1", 5.0)
    assert client.labels == []
