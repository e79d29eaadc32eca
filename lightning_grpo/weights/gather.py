"""From (sharded) parameters to whole tensors under their checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import Protocol, runtime_checkable

from lightning_grpo.errors import WeightSyncError
from lightning_grpo.weights.buckets import empty_run
from lightning_grpo.weights.names import (
    ADAPTED_PART,
    checkpoint_names,
    pretrained_prefix,
    ties_head,
)
from lightning_grpo.weights.rounding import round_by_chance


@runtime_checkable
class AdaptedLayer(Protocol):
    """A linear layer of PEFT: its own weight, and adapters that are added to it.

    Submodules and parameters are left out: from Python 3.12 on (and in typing_extensions, so that
    it is the same everywhere) the check doesn't see what a module finds by `__getattr__`.
    """

    @property
    def active_adapters(self) -> list[str]:
        """Names of what is added."""
        ...

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight; sharded where its parameters are."""


@torch.no_grad()
def gather_weights(
    module: nn.Module,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    keep: bool = True,
    into: Mapping[str, Tensor] | None = None,
) -> Mapping[str, Tensor]:
    """Copies every weight, whole, in the dtype that the servers run in.

    Collective where parameters are sharded: every rank must call it. Shards are cast before they
    are gathered, so that no more travels than needed. The copies share no memory with the model,
    which may train on while they are sent. Adapters are merged before the cast, in the parameters'
    own precision, so that servers need not know of them. What an adapter adds may be far below half
    a unit of `dtype`, so that no weight would change by rounding to the nearest: merged weights are
    rounded by chance instead, and the servers compute on average what the trainer does.

    Args:
        module: The policy, plain, wrapped, or sharded by `fully_shard`.
        dtype: Of the servers; None keeps each parameter's own.
        device: Where the copies go; None keeps each parameter's own.
        keep: Whether this rank wants the result (rank 0 does); the others get an empty dict.
        into: What an earlier call returned: its memory is written to, and it is returned.
    """
    _reshard(module)
    parameters = dict(module.named_parameters())
    names = checkpoint_names(parameters, pretrained_prefix(module), tied=ties_head(module))
    copies: Mapping[str, Tensor] = into or {}
    if keep and into is None:
        wanted = {target: parameters[name] for name, target in names.items()}
        copies = empty_run(wanted, dtype, device)
    at_once: dict[str, Tensor] = {}
    for name, target in names.items():
        parameter, layer = parameters[name], _adapted_layer(module, name)
        if layer is None and not _is_scattered(parameter):
            at_once[target] = _local(parameter)
            continue
        whole = _whole(parameter, layer, dtype, name)
        if keep:
            copies[target].copy_(whole)
    if keep and at_once:
        # One call casts and copies them all: a model has hundreds of parameters. No public name
        # does it; FSDP2 calls this one, too.
        torch._foreach_copy_([copies[target] for target in at_once], list(at_once.values()))
    return copies


def _reshard(module: nn.Module) -> None:
    """After a forward pass the root may still be whole, in the compute dtype."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def _adapted_layer(module: nn.Module, name: str) -> AdaptedLayer | None:
    """The layer of PEFT whose own weight it is; few names are asked, for the check is slow."""
    owner, found, _ = name.rpartition(f".{ADAPTED_PART}.weight")
    if not found:
        return None
    layer = module.get_submodule(owner)
    if not isinstance(layer, AdaptedLayer):
        raise WeightSyncError(
            f"{owner} ({type(layer).__name__}) wraps a weight as PEFT's layers do, but can't say"
            " what it adds: servers would get the weight alone. Use a linear layer with LoRA."
        )
    return layer


def _merged(weight: Tensor, layer: AdaptedLayer, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        weight = weight.to(dtype).to(weight.dtype)  # as the trainer casts it beside the adapter
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter)
    return weight


def _whole(
    parameter: Tensor, layer: AdaptedLayer | None, dtype: torch.dtype | None, name: str
) -> Tensor:
    """The weight in `dtype`, merged with what adapts it, from all shards."""
    if layer is not None:
        parameter = _merged(parameter, layer, dtype)
    own = _local(parameter)
    if dtype is not None and own.is_floating_point():
        own = own.to(dtype) if layer is None else round_by_chance(own, dtype, name)
    if not _is_scattered(parameter):
        return own
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


def _is_scattered(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1


def _local(parameter: Tensor) -> Tensor:
    # Each operation on a DTensor costs the CPU a tenth of a millisecond.
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
