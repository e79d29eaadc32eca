import base64
import io
import pickle
from multiprocessing import resource_sharer
from types import SimpleNamespace

import pytest
import torch

from lightning_grpo.errors import ConfigError
from lightning_grpo.weights.gather import make_buckets
from lightning_grpo.weights.process_group import IPCTransport, message_of
from lightning_grpo.weights.transport import Place

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
