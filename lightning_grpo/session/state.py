"""A session's state as a checkpoint holds it: bytes as tensors, which `weights_only` loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def to_checkpoint(value: Any) -> Any:
    """Plain data with every `bytes` as a uint8 tensor."""
    if isinstance(value, bytes):
        return torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0)
    if isinstance(value, Mapping):
        return {k: to_checkpoint(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_checkpoint(v) for v in value]
    return value


def from_checkpoint(value: Any) -> Any:
    """The inverse of `to_checkpoint` (tuples come back as lists)."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {k: from_checkpoint(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_checkpoint(v) for v in value]
    return value
