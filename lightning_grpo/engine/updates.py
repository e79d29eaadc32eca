"""Weight updates of the engine, from a folder or over SGLang's weight update groups.

The trainer is rank 0 and broadcasts. The group is made beside any other, as SGLang makes it: a
TCP rendezvous at the trainer's address and the group's name as prefix of its keys.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from anyio.to_thread import run_sync
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
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
from lightning_grpo.errors import ConfigError
from lightning_grpo.naming import CheckpointNames, UnnamedWeightsError

_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    *(EOFError, SafetensorError, pickle.UnpicklingError),
)
"""What transformers raises for folders that it can't make a model of (RuntimeError: also deep)."""
_TIMEOUT = timedelta(seconds=300)
"""How long joining a group, or one broadcast, may take."""


class ModelWeights:
    """The weights of the running model under the names of a Hugging Face checkpoint.

    A checkpoint may hold them otherwise than transformers does: experts one by one, projections in
    one. Each of its tensors has its own place in the model, so that they come in any order, and
    some of them alone.

    Raises:
        ConfigError: A checkpoint of such a model can't be written to it piece by piece.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._names = CheckpointNames(model)
        self._own: dict[str, Tensor] = dict(model.state_dict())
        self._views = self._names.views(self._own)
        try:
            self._spread = _spread(self._names.origins(self._own), self._own)
            # Of tied weights one; nobody trains a buffer, or misses it.
            parameters = dict(model.named_parameters())
            self._needed = {self._place(name): name for name in self._names.of(parameters)}
            missed = sum(p.numel() for p in parameters.values()) - self._size(self._needed.values())
            if missed:
                raise UnnamedWeightsError(f"it would leave {missed} numbers as they are")
        except UnnamedWeightsError as error:
            raise ConfigError(
                f"`model` must be one whose checkpoints can be written to it, for "
                f"{type(model).__name__} they can't: {error}. Way out: SGLangServers."
            ) from error

    def check(self, tensors: Mapping[str, Tensor], *, complete: bool = False) -> None:
        """Check names and shapes of new weights; if complete, that all are there, tied ones once.

        Raises:
            WeightUpdateError: Naming the first that is wrong.
        """
        for name, tensor in tensors.items():
            mine = self._shape(name)
            if mine is None:
                raise WeightUpdateError(self._unknown(name))
            if mine != tensor.shape:
                raise WeightUpdateError(
                    f"weight {name!r} must have shape {list(mine)}, got {list(tensor.shape)}"
                )
        given = {self._place(name) for name in tensors}
        missing = sorted(self._needed[place] for place in self._needed.keys() - given)
        if complete and missing:
            raise WeightUpdateError(
                f"{len(missing)} weights of the model are missing, {missing[0]!r} first"
            )

    def writer(
        self, tensors: Mapping[str, Tensor], *, complete: bool = False
    ) -> Callable[[], None]:
        """What writes new weights, after all of them were checked."""
        self.check(tensors, complete=complete)

        def write() -> None:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    if name in self._views:
                        self._views[name].copy_(tensor)
                    else:
                        self._spread[name].write(tensor)

        return write

    def read_folder(self, path: str) -> Mapping[str, Tensor]:
        """Read a checkpoint that could replace the running weights.

        Files that name their tensors as such checkpoints do are read as they are; anything else
        goes through transformers, which knows the older names of each architecture.

        Raises:
            WeightUpdateError: If there is no checkpoint at `path` or it can't be read.
        """
        if not Path(path).is_dir():
            raise WeightUpdateError(
                f"`model_path` must be a folder of this machine (nothing is fetched), got {path!r}"
            )
        try:
            tensors = _read_safetensors(Path(path))
            if tensors and all(self._shape(name) is not None for name in tensors):
                return tensors
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except _UNREADABLE as error:
            raise WeightUpdateError(f"can't load weights from {path!r}: {error}") from error
        for problem in ("missing_keys", "mismatched_keys"):
            if found := sorted(map(str, loaded[1].get(problem, ()))):
                raise WeightUpdateError(f"weights from {path!r} have {problem}: {found[0]!r} first")
        return CheckpointNames(loaded[0]).of(loaded[0].state_dict())

    def _shape(self, name: str) -> torch.Size | None:
        mine = self._views.get(name, self._spread.get(name))
        return None if mine is None else mine.shape

    def _place(self, name: str) -> int | str:
        """The same for names of the same memory."""
        return self._views[name].data_ptr() if name in self._views else name

    def _size(self, names: Iterable[str]) -> int:
        return sum((self._shape(name) or torch.Size()).numel() for name in names)

    def _unknown(self, name: str) -> str:
        said = f"the model has no weight {name!r}"
        if name in self._own:
            first, *more = self._names.of({name: self._own[name]})
            said += f" in its checkpoint, which holds it as {first!r}"
            said += f" and {len(more)} more" if more else ""
        return said


@dataclass(frozen=True)
class _Spread:
    """A checkpoint's tensor whose elements are not one block of the model's memory.

    Attributes:
        shape: In the checkpoint.
        parts: Where in it and where in a weight of the model, of each weight that it touches.
    """

    shape: torch.Size
    parts: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def write(self, tensor: Tensor) -> None:
        """Bring each element to its place."""
        given = tensor.flatten()
        for chosen, weight, places in self.parts:
            weight[places] = given[chosen].to(weight.dtype)


def _spread(origins: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, _Spread]:
    """Where elements of a checkpoint go, by their places in all the model's weights end to end."""
    ends = torch.tensor([tensor.numel() for tensor in own.values()]).cumsum(0)
    weights = list(own.values())
    found: dict[str, _Spread] = {}
    for name, origin in origins.items():
        places = origin.flatten()
        owners = torch.searchsorted(ends, places, right=True)
        parts = []
        for owner in owners.unique().tolist():
            weight, chosen = weights[owner], (owners == owner).nonzero().squeeze(1)
            start = int(ends[owner]) - weight.numel()
            parts.append((chosen, weight.view(-1), places[chosen] - start))
        found[name] = _Spread(origin.shape, tuple(parts))
    return found


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in one file or, by its index, in several; empty without one."""
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = {Path(file).name for file in json.loads(index.read_text())["weight_map"].values()}
    elif not (folder / "model.safetensors").is_file():
        return {}
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


@dataclass(eq=False)
class TrainerGroup:
    """A group that the trainer, its rank 0, opened and this engine joined.

    It is made of the parts that torch's `new_group` would use, which leaves torch's global state
    alone. Only here is it in a variable: whatever else holds it, if only the traceback of an error,
    would keep its connection open, and the other side waiting.
    """

    name: str
    _group: Any

    @classmethod
    def join(cls, body: InitGroupBody) -> TrainerGroup:
        """Join the group that the trainer opens; blocks until all members are there.

        Raises:
            WeightUpdateError: If they don't come.
        """
        name, rank, size = body.group_name, body.rank_offset, body.world_size
        try:
            store: Any = TCPStore(body.master_address, body.master_port, size, False, _TIMEOUT)
            for prefix in (name, f"{name}/", "cpu/"):
                store = PrefixStore(prefix, store)
            return cls(name, dist.ProcessGroupGloo(store, rank, size, _TIMEOUT))
        except (RuntimeError, ValueError) as error:
            raise WeightUpdateError(f"can't join group {name!r}: {error}") from error

    def receive(self, tensor: Tensor) -> None:
        """Fill a tensor with the trainer's next broadcast; blocks.

        Raises:
            WeightUpdateError: If the broadcast fails, or the group was left.
        """
        group, failure = self._group, "it was left"
        try:
            if group is not None:
                # Held until it is over: the end of a group waits for its broadcasts.
                group.broadcast(tensor, 0).wait()
                return
        except (RuntimeError, ValueError) as error:
            failure = str(error)
        finally:
            del group
        raise WeightUpdateError(f"the broadcast in {self.name!r} failed: {failure}")

    def receive_bucket(
        self, body: DistributedUpdateBody, dtypes: Sequence[torch.dtype]
    ) -> dict[str, Tensor]:
        """Receive all tensors of a bucket; blocks.

        Without a format each is one broadcast. A flattened bucket is one broadcast of bytes: the
        tensors in the order of `names`, each flattened and viewed as uint8, with nothing between.
        """
        tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, dtype, shape in zip(body.names, dtypes, body.shapes, strict=True)
        }
        if body.load_format is None:
            for tensor in tensors.values():
                self.receive(tensor)
            return tensors
        flat = torch.empty(sum(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8)
        self.receive(flat)
        pieces = flat.split([tensor.nbytes for tensor in tensors.values()])
        for tensor, piece in zip(tensors.values(), pieces, strict=True):
            # A piece may start between two elements of its type, so its bytes are copied.
            tensor.view(-1).view(torch.uint8).copy_(piece)
        return tensors

    def leave(self) -> None:
        """Leave it; a broadcast under way ends when the trainer takes part in it or leaves."""
        self._group = None


def check_bucket(body: DistributedUpdateBody) -> list[torch.dtype]:
    """Check what can be checked before the broadcast, and return the dtypes."""
    counts = (len(body.names), len(body.dtypes), len(body.shapes))
    if len(set(counts)) > 1 or not body.names:
        raise BadRequestError(
            f"`names`, `dtypes` and `shapes` must have the same length, at least 1, got {counts}"
        )
    if len(set(body.names)) < len(body.names):
        raise BadRequestError("`names` must not repeat")
    dtypes: list[Any] = [vars(torch).get(name.removeprefix("torch.")) for name in body.dtypes]
    for name, dtype in zip(body.dtypes, dtypes, strict=True):
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise BadRequestError(f"`dtypes` must name floating point types, got {name!r}")
    return dtypes


# What is abandoned may wait in a collective for ever: it does not keep the process from ending.
_in_thread = partial(run_sync, abandon_on_cancel=True)


@dataclass(eq=False)
class WeightUpdates:
    """Changes the weights of a running engine, one update at a time.

    While generation is paused an update happens at once. Otherwise new requests are held and the
    update waits for those in flight, as in SGLang: each of them stays on one set of weights.

    Attributes:
        engine: Where the weights are used.
        weights: The weights.
        model_path: The folder last loaded from.
    """

    engine: EngineThread
    weights: ModelWeights
    model_path: str

    def __post_init__(self) -> None:
        self._groups: dict[str, TrainerGroup] = {}
        self._lock = asyncio.Lock()

    async def from_disk(self, body: DiskUpdateBody) -> None:
        """Load a Hugging Face folder; all weights or none."""
        await self._replace(body, lambda: self.weights.read_folder(body.model_path), complete=True)
        self.model_path = body.model_path

    async def from_distributed(self, body: DistributedUpdateBody) -> None:
        """Receive a bucket; it is received whole, so that the group stays in step, then checked."""
        dtypes = check_bucket(body)
        group = self._joined(body.group_name)
        await self._replace(body, lambda: group.receive_bucket(body, dtypes))

    async def init_group(self, body: InitGroupBody) -> None:
        """Join a group of the trainer's."""
        if body.rank_offset >= body.world_size:
            raise BadRequestError(
                f"`rank_offset` must be in [1, world_size ({body.world_size})) (the trainer is "
                f"rank 0), got {body.rank_offset}"
            )
        if body.backend != "gloo":
            raise BadRequestError(
                f"`backend` must be 'gloo' (the embedded engine runs on CPUs), got {body.backend!r}"
            )
        if body.group_name in self._groups:
            raise BadRequestError(
                f"`group_name` must be new, got {body.group_name!r}, which was joined before"
            )
        async with self._lock:
            self._groups[body.group_name] = await _in_thread(TrainerGroup.join, body)

    async def destroy_group(self, body: DestroyGroupBody) -> None:
        """Leave a group; buckets that wait for their turn in it are refused."""
        group = self._joined(body.group_name)
        del self._groups[body.group_name]
        await _in_thread(group.leave)

    def _joined(self, name: str) -> TrainerGroup:
        if name not in self._groups:
            known = ", ".join(sorted(self._groups)) or "none"
            raise BadRequestError(
                f"`group_name` must name a group that was joined ({known}), got {name!r}"
            )
        return self._groups[name]

    async def _replace(
        self,
        body: DiskUpdateBody | DistributedUpdateBody,
        fetch: Callable[[], Mapping[str, Tensor]],
        *,
        complete: bool = False,
    ) -> None:
        """Fetch new weights and write them while nothing is sampled."""
        async with self._lock:
            if body.abort_all_requests:
                await self.engine.call(lambda s: s.abort(None))
            drained = await self.engine.call(lambda s: s.hold())
            try:
                await asyncio.wrap_future(drained)
                write = self.weights.writer(await _in_thread(fetch), complete=complete)
                await self.engine.call(
                    lambda s: s.update(write, body.weight_version, body.flush_cache)
                )
            finally:
                await self.engine.call(lambda s: s.release())
