"""Weights over a process group, and over CUDA IPC on a shared GPU.

A process group of the trainer and one server, made the way SGLang makes it.

SGLang joins through `rendezvous("tcp://...")` and torch's private helper for groups. This side
needs neither: the same store, the same prefixes and the backend itself, which leaves torch's global
state alone, so that a broken group is dropped by dropping the object.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.reductions import reduce_tensor

from lightning_grpo._compat import listen_at
from lightning_grpo.errors import ConfigError, ServerError, WeightSyncError, require_seconds
from lightning_grpo.weights.gather import Bucket, make_buckets
from lightning_grpo.weights.transport import (
    Place,
    Reply,
    Snapshot,
    Target,
    Transport,
    UpdateRefusedError,
    require_success,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def in_thread(function: Callable[[], T], name: str) -> T:
    """Runs a blocking call in a daemon thread of its own.

    A cancelled caller goes on at once and leaves the thread to its own time-out: a collective
    can't be interrupted from outside, and must not hold up the loop's default threads meanwhile.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - delivered to the caller
            failure = error
        # The loop may be closed by now: then nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future


POLL_S = 0.002
DEVICES = {"gloo": "cpu", "nccl": "cuda"}
"""The device whose name SGLang's helper puts into the keys of each backend."""


class WeightGroup:
    """The trainer as rank 0, the server's ranks after it.

    Args:
        name: Unique at the server.
        backend: `gloo` or `nccl`.
        world_size: 1 + the server's ranks.
        host: This machine's address as the server sees it.
        timeout_s: Of joining, and of each broadcast.
    """

    def __init__(
        self, name: str, backend: str, world_size: int, host: str, timeout_s: float
    ) -> None:
        self.name = name
        self.backend = backend
        self.world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)
        port, file = listen_at(host)
        self._store = TCPStore(
            host, port, None, True, self._timeout, wait_for_workers=False, master_listen_fd=file
        )
        self._host = host
        self._quiet_keys = self._store.num_keys()
        self._backend: Any = None

    def invitation(self) -> dict[str, object]:
        """The body of `/init_weights_update_group`."""
        return {
            "master_address": self._host,
            "master_port": self._store.port,
            "rank_offset": 1,
            "world_size": self.world_size,
            "group_name": self.name,
            "backend": self.backend,
        }

    def join(self, stopped: list[bool]) -> None:
        """Blocks until the server has joined, too.

        The server's first key in the store is awaited before: joining can't be interrupted, and a
        server that refuses the invitation never comes.

        Args:
            stopped: Not empty once joining is pointless.
        """
        deadline = time.monotonic() + self._timeout.total_seconds()
        while self._store.num_keys() <= self._quiet_keys:
            if stopped:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not join {self.name}")
            time.sleep(POLL_S)
        prefix = PrefixStore(self.name, self._store)
        prefix = PrefixStore(f"{self.name}/", prefix)
        prefix = PrefixStore(f"{DEVICES[self.backend]}/", prefix)
        if self.backend == "gloo":
            self._backend = dist.ProcessGroupGloo(prefix, 0, self.world_size, self._timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._backend = dist.ProcessGroupNCCL(prefix, 0, self.world_size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """Sends a tensor to every rank of the server; blocks until it is there."""
        backend = self._backend
        assert backend is not None, "the group was not joined, or left"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        try:
            if tensor.is_cuda:
                # On a stream of its own: the policy's next pass must not wait for the server.
                stream = torch.cuda.Stream(tensor.device)
                stream.wait_stream(torch.cuda.current_stream(tensor.device))
                with torch.cuda.stream(stream):
                    backend.broadcast([tensor], options).wait()
                    stream.synchronize()
            else:
                backend.broadcast([tensor], options).wait()
        finally:
            del backend  # an error's traceback would keep the connection open

    def abort(self) -> None:
        """Breaks the group, as far as the backend can; NCCL's kernels are ended."""
        if self._backend is not None and self.backend == "nccl":
            self._backend.abort()

    def leave(self) -> None:
        """Closes this side's connection, once no broadcast is under way."""
        self.abort()
        self._backend = None


def address_towards(url: str) -> str:
    """The address of this machine that a server at `url` can reach.

    It is the one that packets to the server would carry; nothing is sent to find out.
    """
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    family, _, _, _, address = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


LEAVE_TIMEOUT_S = 5.0
ONE_DEVICE = "Duplicate GPU"
"""NCCL's words for two ranks on one device."""
ONE_GPU = " Trainer and server share a GPU, which NCCL refuses: use `WeightSync(IPCTransport())`."
BACKENDS = ("auto", "gloo", "nccl")


class ProcessGroupTransport(Transport):
    """Broadcasts flat buckets from the trainer to each server: gloo on CPUs, NCCL on GPUs.

    Each server has its own group, so that one that fails leaves the others' alone; they receive at
    the same time. NCCL needs the trainer and the server on different GPUs.

    Args:
        backend: `gloo`, `nccl`, or `auto`: by where the weights are.
        timeout_s: Of joining a group and of each broadcast. A broadcast that the server refused
            can't be called back; its thread and its bucket are kept until then.
    """

    in_session = True

    def __init__(self, backend: str = "auto", timeout_s: float = 60.0) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
        require_seconds("timeout_s", timeout_s)
        self.backend = backend
        self.timeout_s = timeout_s
        self._bucket_bytes = 0
        self._buckets: list[Bucket] = []
        self._groups: dict[str, WeightGroup] = {}

    def bind(self, place: Place) -> None:
        """Takes the size of buckets."""
        self._bucket_bytes = place.bucket_bytes

    def prepare(self, snapshot: Snapshot, version: int) -> int:
        """Flattens the weights, on whichever device they are."""
        self._buckets = make_buckets(snapshot, self._bucket_bytes)
        if self.backend == "gloo":  # which moves what is in host memory
            self._buckets = [replace(b, flat=b.flat.cpu()) for b in self._buckets]
        return sum(bucket.flat.nbytes for bucket in self._buckets)

    async def send(self, target: Target, label: str, timeout_s: float) -> None:
        """Connects where there is no group yet, then sends bucket by bucket.

        The label travels with the last bucket only: before it the server has a mixture.
        """
        group = self._groups.get(target.url) or await self._connect(target, timeout_s)
        last = len(self._buckets) - 1
        for index, bucket in enumerate(self._buckets):
            body = bucket.request(group.name, label if index == last else None)
            await self._send_bucket(target, group, bucket, body, timeout_s)

    async def abandon(self, target: Target) -> None:
        """Drops the group here and, if it still listens, at the server."""
        group = self._groups.pop(target.url, None)
        if group is None:
            return
        group.leave()
        if target.alive:
            with contextlib.suppress(ServerError):
                await target.client.update(
                    "/destroy_weights_update_group", {"group_name": group.name}, LEAVE_TIMEOUT_S
                )

    async def _connect(self, target: Target, timeout_s: float) -> WeightGroup:
        # A server may still know the names of a run that crashed.
        name = f"weights-{uuid.uuid4().hex[:12]}"
        group = await in_thread(
            lambda: WeightGroup(
                name,
                self._backend_of_weights(),
                1 + target.tp_size,
                address_towards(target.url),
                self.timeout_s,
            ),
            "weight group store",
        )
        stopped: list[bool] = []
        invitation = asyncio.ensure_future(
            target.client.update("/init_weights_update_group", group.invitation(), timeout_s)
        )
        joining = asyncio.ensure_future(
            in_thread(lambda: group.join(stopped), f"join {group.name}")
        )
        try:
            await _both(invitation, joining, target, "to join a weight group")
        except UpdateRefusedError as error:
            # Nothing was sent: there is nothing for a probe to find out.
            raise WeightSyncError(str(error)) from error
        finally:
            stopped.append(True)
        self._groups[target.url] = group
        return group

    async def _send_bucket(
        self,
        target: Target,
        group: WeightGroup,
        bucket: Bucket,
        body: dict[str, object],
        timeout_s: float,
    ) -> None:
        reply = asyncio.ensure_future(
            target.client.update("/update_weights_from_distributed", body, timeout_s)
        )
        sending = asyncio.ensure_future(
            in_thread(lambda: group.broadcast(bucket.flat), f"broadcast {group.name}")
        )
        try:
            await _both(reply, sending, target, f"a bucket of {len(bucket.names)} weights")
        except BaseException:
            group.abort()
            raise

    def _backend_of_weights(self) -> str:
        if self.backend != "auto":
            return self.backend
        on_gpu = any(bucket.flat.is_cuda for bucket in self._buckets)
        return "nccl" if on_gpu and torch.distributed.is_nccl_available() else "gloo"


async def _both(
    reply: asyncio.Future[Reply], collective: asyncio.Future[None], target: Target, what: str
) -> None:
    """Waits for the server's answer and the collective together; a refusal ends the wait at once.

    Raises:
        UpdateRefusedError: The server said no.
        ServerError: It could not be reached.
        WeightSyncError: The collective failed.
    """
    tasks: set[asyncio.Future[object]] = {reply, collective}  # type: ignore[arg-type]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if reply in done:
            require_success(reply.result(), target, what)
        try:
            await collective
        except (RuntimeError, TimeoutError) as error:
            way_out = ONE_GPU if ONE_DEVICE in str(error) else ""
            raise WeightSyncError(
                f"{target.url}: sending {what} failed: {error}{way_out}"
            ) from error
        require_success(await reply, target, what)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
        finish_copies(self._buckets)
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
        await send_handles(self._buckets, target, label, timeout_s)

    async def abandon(self, target: Target) -> None:
        """Nothing connects to the server."""

    async def close(self, targets: list[Target]) -> None:
        """Gives the shared memory back."""
        self._buckets = []
        stop_sharing()


class DirectTransport(ProcessGroupTransport):
    """From GPU to GPU: by NCCL, or by CUDA IPC to a server that turns out to be on the trainer's.

    Nobody tells which GPU a server has that somebody else started. NCCL does, at the first bucket:
    it refuses two ranks on one.
    """

    def __init__(self, backend: str = "nccl") -> None:
        super().__init__(backend)
        self._sharing: set[str] = set()

    def prepare(self, snapshot: Snapshot, version: int) -> int:
        """Flattens the weights, on the GPU where they are."""
        size = super().prepare(snapshot, version)
        if self._sharing:
            finish_copies(self._buckets)
        return size

    async def send(self, target: Target, label: str, timeout_s: float) -> None:
        """By a group as long as NCCL takes it."""
        if target.url not in self._sharing:
            try:
                await super().send(target, label, timeout_s)
                return
            except WeightSyncError as error:
                if ONE_DEVICE not in str(error) or target.tp_size > 1:
                    raise
            logger.info("%s is on the trainer's own GPU: weights go there by CUDA IPC", target.url)
            await self.abandon(target)
            await in_thread(lambda: finish_copies(self._buckets), "share weights")
            self._sharing.add(target.url)
        await send_handles(self._buckets, target, label, timeout_s)

    async def abandon(self, target: Target) -> None:
        """Drops the group, and what is known of the server's GPU: it may come back on another."""
        self._sharing.discard(target.url)
        await super().abandon(target)

    async def close(self, targets: list[Target]) -> None:
        """Ends the groups, and gives shared memory back."""
        await super().close(targets)
        self._buckets = []
        stop_sharing()


async def send_handles(
    buckets: Sequence[Bucket], target: Target, label: str, timeout_s: float
) -> None:
    """Hand buckets over to a server on the same GPU; the label goes with the last."""
    for bucket in buckets:
        # Handles are counted: each server, and each attempt, needs its own.
        message = await in_thread(lambda b=bucket: message_of(b), "share weights")  # type: ignore[misc]
        body: dict[str, Any] = {
            "serialized_named_tensors": [message],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        if bucket is buckets[-1]:
            body["weight_version"] = label
        reply = await target.client.update("/update_weights_from_tensor", body, timeout_s)
        require_success(reply, target, f"a bucket of {len(bucket.names)} weights")


def stop_sharing() -> None:
    """Give back the memory that other processes have let go of."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()


def finish_copies(buckets: Sequence[Bucket]) -> None:
    """Wait until what was copied into buckets is there for another process to read."""
    if buckets[0].flat.is_cuda:
        torch.cuda.synchronize(buckets[0].flat.device)


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
