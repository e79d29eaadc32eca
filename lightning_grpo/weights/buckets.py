"""Flat buckets: many tensors as one run of bytes, laid out as SGLang's `flattened_bucket`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Tensors of one dtype, end to end.

    Attributes:
        names: In the order of the bytes.
        dtype: As SGLang spells it (`float32`).
        shapes: One for each name.
        flat: The bytes, uint8.
    """

    names: tuple[str, ...]
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    flat: Tensor

    def request(self, group_name: str, label: str | None) -> dict[str, object]:
        """The body of `/update_weights_from_distributed`; flushing is a phase of its own."""
        body: dict[str, object] = {
            "names": list(self.names),
            "dtypes": [self.dtype] * len(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "abort_all_requests": False,
        }
        if label is not None:
            body["weight_version"] = label
        return body


def make_buckets(tensors: Mapping[str, Tensor], bucket_bytes: int) -> list[Bucket]:
    """Packs tensors into buckets of at most `bucket_bytes`; a larger tensor gets its own.

    A bucket holds one dtype only: the receiver views the bytes in place, which needs each tensor
    to begin at a multiple of its element size. Tensors that lie end to end already, as `empty_run`
    lays them, are not copied: the bucket is their memory.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(name)
    buckets: list[Bucket] = []
    for names in by_dtype.values():
        pending: list[str] = []
        size = 0
        for name in names:
            if pending and size + tensors[name].nbytes > bucket_bytes:
                buckets.append(_pack(tensors, pending))
                pending, size = [], 0
            pending.append(name)
            size += tensors[name].nbytes
        buckets.append(_pack(tensors, pending))
    return buckets


def unpack(bucket: Bucket) -> dict[str, Tensor]:
    """The tensors of a bucket, as views of its bytes."""
    dtype = getattr(torch, bucket.dtype)
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        end = start + torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = bucket.flat[start:end].view(dtype).reshape(shape)
        start = end
    return tensors


def empty_run(
    like: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device | str | None
) -> dict[str, Tensor]:
    """Room for a copy of each tensor, end to end in the order of the names.

    Args:
        like: What the copies are of.
        dtype: Of floating-point copies; None keeps each tensor's own.
        device: Where they are; None keeps each tensor's own.
    """
    rooms: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in like.items():
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        place = tensor.device if device is None else torch.device(device)
        rooms.setdefault((cast, place), []).append(name)
    run: dict[str, Tensor] = {}
    for (cast, place), names in rooms.items():
        flat = torch.empty(sum(like[name].numel() for name in names), dtype=cast, device=place)
        parts = flat.split([like[name].numel() for name in names])
        run |= {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}
    return {name: run[name] for name in like}


def _pack(tensors: Mapping[str, Tensor], names: list[str]) -> Bucket:
    chosen = [tensors[name].detach() for name in names]
    flat = _run_of(chosen)
    if flat is None:
        flat = torch.cat([tensor.flatten() for tensor in chosen])
    return Bucket(
        names=tuple(names),
        dtype=str(chosen[0].dtype).removeprefix("torch."),
        shapes=tuple(tuple(t.shape) for t in chosen),
        flat=flat.view(torch.uint8),
    )


def _run_of(tensors: list[Tensor]) -> Tensor | None:
    """The memory of tensors that lie end to end in it, else None."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        in_place = tensor.data_ptr() == end and tensor.untyped_storage().data_ptr() == storage
        if not in_place or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return first.as_strided((sum(t.numel() for t in tensors),), (1,))
