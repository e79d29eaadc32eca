"""Weight updates of the engine, from a folder or over SGLang's weight update groups.

The trainer is rank 0 and broadcasts. The group is made beside any other, as SGLang makes it: a
TCP rendezvous at the trainer's address and the group's name as prefix of its keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.distributed_c10d import (
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)
from torch.distributed.rendezvous import rendezvous
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.engine.requests import (
    BadRequestError,
    DestroyGroupBody,
    DiskUpdateBody,
    DistributedUpdateBody,
    InitGroupBody,
    WeightUpdateError,
)
from lightning_grpo.engine.scheduler import EngineThread

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    *(EOFError, SafetensorError, pickle.UnpicklingError),
)
"""What transformers raises for folders that it can't make a model of (RuntimeError: also deep)."""


class ModelWeights:
    """The weights of the running model under the names of a Hugging Face checkpoint.

    Args:
        model: The model that generates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors: dict[str, Tensor] = dict(model.state_dict())
        stored: dict[int, str] = {}
        for name, tensor in model.named_parameters():  # nobody trains a buffer, or sends it
            stored.setdefault(tensor.data_ptr(), name)
        self._needed = frozenset(stored.values())

    def check(self, shapes: Mapping[str, Sequence[int]], *, complete: bool = False) -> None:
        """Check names and shapes of new weights.

        Args:
            shapes: Shape of each new tensor.
            complete: Whether all must be there (tied ones once).

        Raises:
            WeightUpdateError: Naming the first that is wrong.
        """
        for name, shape in shapes.items():
            mine = self._tensors.get(name)
            if mine is None:
                raise WeightUpdateError(f"the model has no weight {name!r}")
            if list(mine.shape) != list(shape):
                raise WeightUpdateError(
                    f"weight {name!r} must have shape {list(mine.shape)}, got {list(shape)}"
                )
        if complete:
            given = {self._tensors[name].data_ptr() for name in shapes}
            missing = [n for n in sorted(self._needed) if self._tensors[n].data_ptr() not in given]
            if missing:
                raise WeightUpdateError(
                    f"{len(missing)} weights of the model are missing, {missing[0]!r} first"
                )

    def writer(
        self, tensors: Mapping[str, Tensor], *, complete: bool = False
    ) -> Callable[[], None]:
        """What writes new weights, after all of them were checked."""
        self.check({name: tensor.shape for name, tensor in tensors.items()}, complete=complete)

        def write() -> None:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    self._tensors[name].copy_(tensor)

        return write

    def read_folder(self, path: str) -> dict[str, Tensor]:
        """Read a checkpoint that could replace the running weights.

        Files that name their tensors as the model does are read as they are; anything else goes
        through transformers, which knows how checkpoints of each architecture are named.

        Raises:
            WeightUpdateError: If there is no checkpoint at `path` or it can't be read.
        """
        if not Path(path).is_dir():
            raise WeightUpdateError(
                f"`model_path` must be a folder of this machine (nothing is fetched), got {path!r}"
            )
        try:
            tensors = _read_safetensors(Path(path))
            if tensors is not None and tensors.keys() <= self._tensors.keys():
                return tensors
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            model, info = loaded
        except _UNREADABLE as error:
            raise WeightUpdateError(f"can't load weights from {path!r}: {error}") from error
        for problem in ("missing_keys", "mismatched_keys"):
            if info.get(problem):
                first = min(map(str, info[problem]))
                raise WeightUpdateError(f"weights from {path!r} have {problem}: {first!r} first")
        return dict(model.state_dict())


def _read_safetensors(folder: Path) -> dict[str, Tensor] | None:
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())
        files = sorted({Path(file).name for file in index["weight_map"].values()})
    elif (folder / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        return None
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = opened.get_tensor(name)
    return tensors


TIMEOUT = timedelta(seconds=300)
"""How long joining a group, or one broadcast, may take."""

_FLAT = "flattened_bucket"


class TrainerGroup:
    """A group that the trainer opened and this engine joined; the trainer is rank 0.

    Only here is torch's group in a variable: whatever else holds it, if only the traceback of an
    error, would keep its connection open, and the other side waiting.
    """

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        self.name = name
        self._group: dist.ProcessGroup | None = group

    @classmethod
    def join(cls, body: InitGroupBody, timeout: timedelta = TIMEOUT) -> TrainerGroup:
        """Join the group that the trainer opens; blocks until all members are there.

        Raises:
            WeightUpdateError: If they don't come.
        """
        try:
            store, rank, world_size = next(
                rendezvous(
                    f"tcp://{body.master_address}:{body.master_port}",
                    rank=body.rank_offset,
                    world_size=body.world_size,
                    timeout=timeout,
                )
            )
            store.set_timeout(timeout)
            group, _ = _new_process_group_helper(
                world_size,
                rank,
                [],
                body.backend,
                PrefixStore(body.group_name, store),
                group_name=GroupName(body.group_name),
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise WeightUpdateError(f"can't join group {body.group_name!r}: {error}") from error
        # Lets `broadcast` take ranks of this group, there being no default group to number them.
        _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
        return cls(body.group_name, group)

    def receive(self, tensor: Tensor) -> None:
        """Fill a tensor with the trainer's next broadcast; blocks.

        Raises:
            WeightUpdateError: If the broadcast fails, or the group was left.
        """
        failure = "it was left"
        try:
            if self._group is not None:
                dist.broadcast(tensor, src=0, group=self._group)
                return
        except (RuntimeError, ValueError) as error:
            failure = str(error)
        raise WeightUpdateError(f"the broadcast in {self.name!r} failed: {failure}")

    def leave(self) -> None:
        """Leave it; one that is already broken is no error.

        A broadcast under way ends when the trainer takes part in it or leaves, too.
        """
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group(group)


def check_bucket(body: DistributedUpdateBody) -> list[torch.dtype]:
    """Check what can be checked before the broadcast, and return the dtypes."""
    counts = (len(body.names), len(body.dtypes), len(body.shapes))
    if len(set(counts)) > 1 or not body.names:
        raise BadRequestError(
            f"`names`, `dtypes` and `shapes` must have the same length, at least 1, got {counts}"
        )
    if len(set(body.names)) < len(body.names):
        raise BadRequestError("`names` must not repeat")
    if body.load_format not in (None, _FLAT):
        raise BadRequestError(f"`load_format` must be null or {_FLAT!r}, got {body.load_format!r}")
    return [_dtype(name) for name in body.dtypes]


def _dtype(name: str) -> torch.dtype:
    dtype = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BadRequestError(f"`dtypes` must name floating point types, got {name!r}")
    return dtype


def receive_bucket(
    group: TrainerGroup, body: DistributedUpdateBody, dtypes: Sequence[torch.dtype]
) -> dict[str, Tensor]:
    """Receive all tensors of a bucket from rank 0; blocks.

    Without a format each tensor is one broadcast. A flattened bucket is one broadcast of bytes: the
    tensors in the order of `names`, each flattened and viewed as uint8, with nothing between them.

    Raises:
        WeightUpdateError: If the broadcast fails.
    """
    tensors = {
        name: torch.empty(shape, dtype=dtype)
        for name, dtype, shape in zip(body.names, dtypes, body.shapes, strict=True)
    }
    if body.load_format is None:
        for tensor in tensors.values():
            group.receive(tensor)
        return tensors
    flat = torch.empty(sum(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8)
    group.receive(flat)
    pieces = flat.split([tensor.nbytes for tensor in tensors.values()])
    for tensor, piece in zip(tensors.values(), pieces, strict=True):
        # A piece may start between two elements of its type, so its bytes are copied into place.
        tensor.view(-1).view(torch.uint8).copy_(piece)
    return tensors


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
        await self._replace(body, lambda: self._weights.read_folder(body.model_path), complete=True)
        self.model_path = body.model_path

    async def from_distributed(self, body: DistributedUpdateBody) -> None:
        """Receive a bucket; it is received whole, so that the group stays in step, then checked."""
        dtypes = check_bucket(body)
        group = self._groups.get(body.group_name)
        if group is None:
            raise self._unknown(body.group_name)
        await self._replace(body, lambda: receive_bucket(group, body, dtypes))

    async def init_group(self, body: InitGroupBody) -> None:
        """Join a group of the trainer's."""
        if body.backend != "gloo":
            raise BadRequestError(
                f"`backend` must be 'gloo' (the embedded engine runs on CPUs), got {body.backend!r}"
            )
        if body.rank_offset >= body.world_size:
            raise BadRequestError(
                f"`rank_offset` must be in [1, world_size ({body.world_size})) (the trainer is "
                f"rank 0), got {body.rank_offset}"
            )
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
            raise self._unknown(body.group_name)
        await in_thread(group.leave)

    def _unknown(self, name: str) -> BadRequestError:
        known = ", ".join(sorted(self._groups)) or "none"
        return BadRequestError(
            f"`group_name` must name a group that was joined ({known}), got {name!r}"
        )

    async def _replace(
        self,
        body: DiskUpdateBody | DistributedUpdateBody,
        fetch: Callable[[], dict[str, Tensor]],
        *,
        complete: bool = False,
    ) -> None:
        """Fetch new weights and write them while nothing is sampled."""
        async with self._lock:
            if body.abort_all_requests:
                await self._engine.call(lambda s: s.abort(None))
            drained = await self._engine.call(lambda s: s.hold())
            try:
                await asyncio.wrap_future(drained)
                write = self._weights.writer(await in_thread(fetch), complete=complete)
                await self._engine.call(
                    lambda s: s.update(write, body.weight_version, body.flush_cache)
                )
            finally:
                await self._engine.call(lambda s: s.release())
