"""Weights over a collective: the engine's side of SGLang's weight update groups, over gloo.

The trainer is rank 0 and broadcasts. The group is made beside any other, as SGLang makes it: a
TCP rendezvous at the trainer's address and the group's name as prefix of its keys.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# Private in torch; there from 1.13 to 2.13 (seen), under the same names.
from torch.distributed.distributed_c10d import (
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)
from torch.distributed.rendezvous import rendezvous

from lightning_grpo.engine.errors import BadRequestError, WeightUpdateError
from lightning_grpo.engine.protocol import DistributedUpdateBody, InitGroupBody

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


def check_init(body: InitGroupBody) -> None:
    """Check what a group is asked to be."""
    if body.backend != "gloo":
        raise BadRequestError(
            f"`backend` must be 'gloo' (the embedded engine runs on CPUs), got {body.backend!r}"
        )
    if not 1 <= body.rank_offset < body.world_size:
        raise BadRequestError(
            f"`rank_offset` must be in [1, world_size ({body.world_size})) (the trainer is rank 0),"
            f" got {body.rank_offset}"
        )
    if not 0 < body.master_port < 1 << 16:
        raise BadRequestError(f"`master_port` must be a port, got {body.master_port}")


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
    if any(size < 0 for shape in body.shapes for size in shape):
        raise BadRequestError(f"`shapes` must not be negative, got {body.shapes}")
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
    if body.load_format == _FLAT:
        return _receive_flat(group, body, dtypes)
    tensors = {}
    for name, dtype, shape in zip(body.names, dtypes, body.shapes, strict=True):
        tensors[name] = torch.empty(shape, dtype=dtype)
        group.receive(tensors[name])
    return tensors


def _receive_flat(
    group: TrainerGroup, body: DistributedUpdateBody, dtypes: Sequence[torch.dtype]
) -> dict[str, Tensor]:
    sizes = [
        math.prod(shape) * dtype.itemsize for shape, dtype in zip(body.shapes, dtypes, strict=True)
    ]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    group.receive(flat)
    pieces = flat.split(sizes)
    # A piece may start between two elements of its type, so it is copied before the view.
    return {
        name: piece.clone().view(dtype).view(shape)
        for name, piece, dtype, shape in zip(body.names, pieces, dtypes, body.shapes, strict=True)
    }
