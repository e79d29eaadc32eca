"""Weights over a collective: a group for each server, flat buckets, the reply watched meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import replace

import torch

from lightning_grpo.checks import require_seconds
from lightning_grpo.errors import ConfigError, ServerError, WeightSyncError
from lightning_grpo.weights.buckets import Bucket, make_buckets
from lightning_grpo.weights.collective import WeightGroup, address_towards
from lightning_grpo.weights.threads import in_thread
from lightning_grpo.weights.transport import (
    Place,
    Reply,
    Snapshot,
    Target,
    Transport,
    UpdateRefusedError,
    require_success,
)

LEAVE_TIMEOUT_S = 5.0
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
            way_out = ONE_GPU if "Duplicate GPU" in str(error) else ""
            raise WeightSyncError(
                f"{target.url}: sending {what} failed: {error}{way_out}"
            ) from error
        require_success(await reply, target, what)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
