"""From (sharded) parameters to whole tensors under their checkpoint names."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_grpo.weights.names import (
    ADAPTED_PART,
    checkpoint_names,
    pretrained_prefix,
    ties_head,
)


@runtime_checkable
class AdaptedLayer(Protocol):
    """A linear layer of PEFT: its own weight, and adapters that are added to it."""

    base_layer: nn.Module
    active_adapters: list[str]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight; sharded where its parameters are."""


@torch.no_grad()
def gather_weights(
    module: nn.Module,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    keep: bool = True,
) -> dict[str, Tensor]:
    """Copies every weight, whole, in the dtype that the servers run in.

    Collective where parameters are sharded: every rank must call it. Shards are cast before they
    are gathered, so that no more travels than needed. The copies share no memory with the model,
    which may train on while they are sent. Adapters are merged in the parameters' own precision,
    before the cast, so that servers need not know of them.

    Args:
        module: The policy, plain, wrapped, or sharded by `fully_shard`.
        dtype: Of the servers; None keeps each parameter's own.
        device: Where the copies go; None keeps each parameter's own.
        keep: Whether this rank wants the result (rank 0 does); the others get an empty dict.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            # After a forward pass the root may still be whole, in the compute dtype.
            child.reshard()
    names = checkpoint_names(
        (name for name, _ in module.named_parameters()),
        pretrained_prefix(module),
        tied=ties_head(module),
    )
    adapted = {
        f"{name}.{ADAPTED_PART}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, AdaptedLayer)
    }
    gathered: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if name not in names:
            continue
        merged = _merged(parameter, adapted[name]) if name in adapted else parameter
        whole = _whole(merged, dtype)
        if keep:
            gathered[names[name]] = _copy(whole, parameter, device)
    return gathered


def _merged(weight: Tensor, layer: AdaptedLayer) -> Tensor:
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter)
    return weight


def _whole(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = parameter.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy(whole: Tensor, parameter: Tensor, device: torch.device | str | None) -> Tensor:
    moved = whole.to(device) if device is not None else whole
    shares_memory = (
        not isinstance(parameter, DTensor)
        and moved.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    )
    return moved.clone() if shares_memory else moved.contiguous()
