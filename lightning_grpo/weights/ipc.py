"""Weights on one GPU: the server maps the trainer's memory and copies from it."""

from __future__ import annotations

import base64
import io
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from lightning_grpo.errors import ConfigError
from lightning_grpo.weights.buckets import Bucket, make_buckets
from lightning_grpo.weights.threads import in_thread
from lightning_grpo.weights.transport import Place, Snapshot, Target, Transport, require_success

DEVICE_ARGUMENT = 6
"""Where torch's recipe for a tensor of another process names its GPU."""


class IPCTransport(Transport):
    """Hands flat buckets over by CUDA IPC: for a server on the trainer's own GPU.

    Only handles travel between the processes; the server copies from the trainer's memory into its
    own. NCCL can't serve here, since it refuses two ranks on one device.
    """

    in_session = True

    def __init__(self) -> None:
        self._bucket_bytes = 0
        self._buckets: list[Bucket] = []

    def bind(self, place: Place) -> None:
        """Takes the size of buckets."""
        self._bucket_bytes = place.bucket_bytes

    def prepare(self, snapshot: Snapshot, version: int) -> int:
        """Flattens the weights, on the GPU where they are."""
        self._buckets = make_buckets(snapshot, self._bucket_bytes)
        if self._buckets[0].flat.is_cuda:
            # The copies must be there before another process reads them.
            torch.cuda.synchronize(self._buckets[0].flat.device)
        return sum(bucket.flat.nbytes for bucket in self._buckets)

    async def send(self, target: Target, label: str, timeout_s: float) -> None:
        """Sends the handles bucket by bucket; the label with the last.

        Raises:
            ConfigError: The server has more GPUs than one: a handle is of one GPU only.
        """
        if target.tp_size > 1:
            raise ConfigError(
                f"IPCTransport needs a server on one GPU, {target.url} has {target.tp_size}."
                " Use ProcessGroupTransport."
            )
        last = len(self._buckets) - 1
        for index, bucket in enumerate(self._buckets):
            # Handles are counted: each server, and each attempt, needs its own.
            message = await in_thread(lambda b=bucket: message_of(b), "share weights")  # type: ignore[misc]
            body: dict[str, Any] = {
                "serialized_named_tensors": [message],
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            if index == last:
                body["weight_version"] = label
            reply = await target.client.update("/update_weights_from_tensor", body, timeout_s)
            require_success(reply, target, f"a bucket of {len(bucket.names)} weights")

    async def abandon(self, target: Target) -> None:
        """Nothing connects to the server."""

    async def close(self, targets: list[Target]) -> None:
        """Gives the shared memory back."""
        self._buckets = []
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()


class _Shared:
    """Pickles as the tensor itself, its GPU named by an id that holds in every process.

    Torch names it by its number, which differs where CUDA_VISIBLE_DEVICES does; SGLang takes both.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reduce_tensor(self._tensor)
        if self._tensor.is_cuda:
            uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
            before, after = arguments[:DEVICE_ARGUMENT], arguments[DEVICE_ARGUMENT + 1 :]
            arguments = (*before, uuid, *after)
        return rebuild, arguments


def message_of(bucket: Bucket) -> str:
    """A bucket as SGLang's `flattened_bucket`, without SGLang's classes.

    Its server reads each entry of `metadata` by attribute, so plain namespaces do.
    """
    metadata = []
    dtype = getattr(torch, bucket.dtype)
    start = 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        size = torch.Size(shape).numel() * dtype.itemsize
        metadata.append(
            SimpleNamespace(
                name=name,
                shape=torch.Size(shape),
                dtype=dtype,
                start_idx=start,
                end_idx=start + size,
                numel=size,
            )
        )
        start += size
    buffer = io.BytesIO()
    payload = {"flattened_tensor": _Shared(bucket.flat), "metadata": metadata}
    ForkingPickler(buffer).dump(payload)
    return base64.b64encode(buffer.getvalue()).decode()
