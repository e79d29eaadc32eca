"""RMS norms in one kernel on GPUs, where transformers' own take one for each operation."""

from __future__ import annotations

from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.Module):
    """What transformers' norms have in common."""

    weight: Tensor
    variance_epsilon: float


def fuse_norms(model: nn.Module) -> None:
    """Has every plain RMS norm of a model computed by torch's kernel on GPUs, in place.

    It rounds once, where transformers rounds before it scales. A forward and backward of 24
    sequences of Qwen2.5-1.5B's shape took 348 ms instead of 388 on an H200.
    """
    plain = {kind for kind in map(type, model.modules()) if is_plain(kind)}
    for module in model.modules():
        if type(module) in plain:
            module.forward = MethodType(_forward, module)


def is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class scales by weight / rms, found out by trying: some scale by 1 + weight."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    try:
        with torch.device("cpu"):  # the model itself may be made without storage
            norm = cast("RMSNorm", kind(8).requires_grad_(False).float())
            rows = torch.linspace(-2.0, 3.0, 16, dtype=torch.float32).view(2, 8)
            norm.weight.copy_(rows[1])
        expected = rms_norm(rows, (8,), norm.weight, norm.variance_epsilon)
        return torch.allclose(norm(rows), expected, atol=1e-6)
    except (TypeError, AttributeError, RuntimeError):
        return False


def _forward(self: RMSNorm, hidden: Tensor) -> Tensor:
    if not hidden.is_cuda or hidden.dtype != self.weight.dtype:
        own: Tensor = type(self).forward(self, hidden)
        return own
    return rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)
