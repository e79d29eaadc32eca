"""Weight updates from start to end: wait, receive or read, write between two steps, name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TypeVar

from lightning_grpo.engine.errors import BadRequestError
from lightning_grpo.engine.loop import EngineThread
from lightning_grpo.engine.process_group import (
    TrainerGroup,
    check_bucket,
    check_init,
    receive_bucket,
)
from lightning_grpo.engine.protocol import (
    DestroyGroupBody,
    DiskUpdateBody,
    DistributedUpdateBody,
    InitGroupBody,
)
from lightning_grpo.engine.weights import ModelWeights

T = TypeVar("T")


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function on a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - recorded for the caller
            future.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return await asyncio.wrap_future(future)


class WeightUpdates:
    """Changes the weights of a running engine, one update at a time.

    While generation is paused an update happens at once. Otherwise new requests are held and the
    update waits for those in flight, as in SGLang: each of them stays on one set of weights.

    Args:
        engine: Where the weights are used.
        weights: The weights.
        model_path: Where they were loaded from.

    Attributes:
        model_path: The folder last loaded from.
    """

    def __init__(self, engine: EngineThread, weights: ModelWeights, model_path: str) -> None:
        self.model_path = model_path
        self._engine = engine
        self._weights = weights
        self._groups: dict[str, TrainerGroup] = {}
        self._lock = asyncio.Lock()

    async def from_disk(self, body: DiskUpdateBody) -> None:
        """Load a Hugging Face folder; all weights or none."""
        async with self._quiet(body.abort_all_requests):
            tensors = await in_thread(lambda: self._weights.read_folder(body.model_path))
            write = self._weights.writer(tensors, complete=True)
            await self._engine.call(
                lambda s: s.update(write, body.weight_version, body.flush_cache)
            )
            self.model_path = body.model_path

    async def from_distributed(self, body: DistributedUpdateBody) -> None:
        """Receive a bucket; it is received whole, so that the group stays in step, then checked."""
        dtypes = check_bucket(body)
        group = self._groups.get(body.group_name)
        if group is None:
            known = ", ".join(sorted(self._groups)) or "none"
            raise BadRequestError(
                f"`group_name` must name a group that was joined ({known}), got {body.group_name!r}"
            )
        async with self._quiet(body.abort_all_requests):
            tensors = await in_thread(lambda: receive_bucket(group, body, dtypes))
            write = self._weights.writer(tensors)
            await self._engine.call(
                lambda s: s.update(write, body.weight_version, body.flush_cache)
            )

    async def init_group(self, body: InitGroupBody) -> None:
        """Join a group of the trainer's."""
        check_init(body)
        if body.group_name in self._groups:
            raise BadRequestError(
                f"`group_name` must be new, got {body.group_name!r}, which was joined before"
            )
        async with self._lock:
            self._groups[body.group_name] = await in_thread(lambda: TrainerGroup.join(body))

    async def destroy_group(self, body: DestroyGroupBody) -> None:
        """Leave a group; buckets that wait for their turn in it are refused."""
        group = self._groups.pop(body.group_name, None)
        if group is None:
            raise BadRequestError(
                f"`group_name` must name a group that was joined, got {body.group_name!r}"
            )
        await in_thread(group.leave)

    @asynccontextmanager
    async def _quiet(self, abort_all: bool) -> AsyncIterator[None]:
        async with self._lock:
            if abort_all:
                await self._engine.call(lambda s: s.abort(None))
            drained = await self._engine.call(lambda s: s.hold())
            try:
                await asyncio.wrap_future(drained)
                yield
            finally:
                await self._engine.call(lambda s: s.release())
