"""A model's tensors under the names and in the layouts of its checkpoint, which servers read.

transformers holds some models otherwise than their checkpoints do: a mixture's experts as one
tensor for all, a fused projection in parts, a head under another name. `save_pretrained` knows the
way back. It is followed here once, on tensors without values; most of what it gives are slices of
what the model holds, which are taken from then on without a copy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lightning_grpo._compat import checkpoint_conversion
from lightning_grpo.errors import GRPOError

Conversion = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class UnnamedWeightsError(GRPOError, ValueError):
    """A model's tensors are no rearrangement of its checkpoint's."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """Where a checkpoint's tensor lies within one of the model's, in elements."""

    source: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    def of(self, tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous():
            raise UnnamedWeightsError(f"{self.source} must be contiguous to be sent in parts")
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.start)


class CheckpointNames:
    """Gives tensors under a checkpoint's names, in the order in which they lie in memory.

    Which names these are follows from the architecture alone, so that it is the same for every rank
    and server, however each came by its model.

    Args:
        model: Of transformers; wrapped, sharded, adapted or not, it is only asked for its class and
            config.
        conversion: From its tensors to those of a checkpoint; None: transformers' own.
    """

    def __init__(self, model: PreTrainedModel, conversion: Conversion | None = None) -> None:
        self._revert = conversion or checkpoint_conversion(model)
        self._shapes: dict[str, torch.Size] = {}
        self._slices: dict[str, _Slice] = {}
        self._copied: tuple[str, ...] = ()
        self._last: tuple[Mapping[str, Tensor], dict[str, Tensor]] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `save_pretrained` would write of some tensors.

        Args:
            tensors: Whole and contiguous, under the model's own names.

        Returns:
            Views of the same memory; for what the checkpoint holds in another order a copy, made
            anew each time. The same object again for the same one (which is `tensors` itself where
            names and layouts are the checkpoint's).
        """
        if self._revert is None:
            return tensors
        if self._last is None or self._last[0] is not tensors:
            self._last = (tensors, self.views(tensors))
        found = self._last[1]
        if self._copied:
            with _Views():
                values = self._revert(dict(tensors))
            found |= {name: values[name].contiguous() for name in self._copied}
        return found

    def views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors that are views of these, and no others."""
        if self._revert is None:
            return dict(tensors)
        self._follow(tensors)
        return {name: part.of(tensors[part.source]) for name, part in self._slices.items()}

    def origins(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where each element comes from, of the checkpoint's tensors that are no views of these.

        Returns:
            int64, in the checkpoint's layouts: an element's place in all `tensors` end to end, in
            their order.

        Raises:
            UnnamedWeightsError: The checkpoint holds other values than the model.
        """
        if self._revert is None:
            return {}
        self._follow(tensors)
        if not self._copied:
            return {}
        total = sum(tensor.numel() for tensor in tensors.values())
        places = _end_to_end(torch.arange(total), tensors)
        try:
            found = self._revert(places)
            chosen = {name: found[name] for name in self._copied}
            flat = torch.cat([each.flatten() for each in chosen.values()])
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnnamedWeightsError(
                f"the way to its checkpoint knows no places: {error}"
            ) from error
        inside = flat.dtype == torch.int64 and bool(((flat >= 0) & (flat < total)).all())
        if not inside or len(flat.unique()) < len(flat):
            raise UnnamedWeightsError(f"{self._copied[0]} holds other values than the model")
        return chosen

    def _follow(self, tensors: Mapping[str, Tensor]) -> None:
        """Find out where in tensors of such shapes those of a checkpoint are."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes == self._shapes:
            return
        assert self._revert is not None
        total = sum(map(math.prod, shapes.values()))
        # Longer than all tensors together: no copy has a storage of that size.
        memory = torch.empty(2 * total + 1, device="meta")
        with _Views():
            found = self._revert(_end_to_end(memory, tensors))
        starts, names = [0], list(shapes)
        for shape in shapes.values():
            starts.append(starts[-1] + math.prod(shape))
        slices, copied = [], []
        for name, tensor in found.items():
            if tensor.untyped_storage().nbytes() != memory.untyped_storage().nbytes():
                copied.append(name)
                continue
            offset = int(tensor.storage_offset())
            index = bisect_right(starts, offset) - 1
            start = offset - starts[index]
            part = _Slice(names[index], tuple(tensor.shape), tensor.stride(), start)
            slices.append((index, start, name, part))
        self._shapes, self._copied = shapes, tuple(copied)
        self._slices = {name: part for _, _, name, part in sorted(slices, key=lambda s: s[:2])}


class _Views(TorchFunctionMode):
    """Has transformers slice without copying: a slice need not be contiguous here."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def _end_to_end(memory: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of a flat tensor, one after the other, in the shapes of others."""
    parts: dict[str, Tensor] = {}
    start = 0
    for name, tensor in like.items():
        parts[name] = memory[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return parts
