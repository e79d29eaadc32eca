"""Objects over a gloo group of our own, entered only when every rank is about to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Exchange(Protocol):
    """Broadcast, scatter and agreement between the ranks."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Entry r of rank 0's list, on rank r."""

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""


class Alone:
    """One process: nothing to exchange."""

    def broadcast(self, value: Any) -> Any:
        """The value itself."""
        return value

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """The only entry."""
        (value,) = values or ()
        return value

    def largest(self, value: int) -> int:
        """The value itself."""
        return value


class GlooExchange:
    """A gloo group beside the default one: CPU tensors, whatever the training backend is.

    Args:
        timeout_s: The group's own limit. Generous: the watchdog is what ends a lost run.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._world_size = dist.get_world_size()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, pickled, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Entry r of rank 0's list, pickled, on rank r."""
        if values is not None and len(values) != self._world_size:
            msg = f"scatter needs one value per rank ({self._world_size}), got {len(values)}."
            raise ValueError(msg)
        box: list[Any] = [None]
        entries = None if values is None else list(values)
        dist.scatter_object_list(box, entries, src=0, group=self._group)
        return box[0]

    def largest(self, value: int) -> int:
        """One all-reduce of one number."""
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group)
        return int(box.item())
