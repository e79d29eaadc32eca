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
    parameters = list(module.named_parameters())
    names = checkpoint_names(
        (name for name, _ in parameters), pretrained_prefix(module), tied=ties_head(module)
    )
    gathered: dict[str, Tensor] = {}
    for name, parameter in parameters:
        if name not in names:
            continue
        layer = _adapted_layer(module, name)
        merged = parameter if layer is None else _merged(parameter, layer)
        whole = _whole_copy(merged, dtype, device, keep=keep)
        if whole is not None:
            gathered[names[name]] = whole
    return gathered


def _adapted_layer(module: nn.Module, name: str) -> AdaptedLayer | None:
    """The layer of PEFT whose own weight it is; few names are asked, for the check is slow."""
    owner, found, _ = name.rpartition(f".{ADAPTED_PART}.weight")
    if not found:
        return None
    layer = module.get_submodule(owner)
    return layer if isinstance(layer, AdaptedLayer) else None


def _merged(weight: Tensor, layer: AdaptedLayer) -> Tensor:
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter)
    return weight


def _whole_copy(
    parameter: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    keep: bool,
) -> Tensor | None:
    # On plain tensors: each operation on a DTensor costs the CPU a tenth of a millisecond, and a
    # model has hundreds of parameters.
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    whole = own.to(dtype) if dtype is not None and own.is_floating_point() else own
    if isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1:
        whole = DTensor.from_local(
            whole,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()
    if not keep:
        return None
    if device is not None:
        whole = whole.to(device)
    return whole.clone() if whole.data_ptr() == own.data_ptr() else whole.contiguous()
