"""`fully_shard` a language model block by block: the Fabric form of `FSDP2Strategy`."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from lightning_grpo._compat import no_split_modules
from lightning_grpo.errors import ConfigError

MESH_DIMENSION = "data_parallel"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: list[str] | None = None,
    param_dtype: str = "auto",
    reduce_dtype: str = "float32",
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> nn.Module:
    """Shard every decoder block, then the root, over the ranks of a mesh.

    All parameters must be used from inside `module.forward`. With Fabric:
    `ModelParallelStrategy(parallelize, data_parallel_size=N, tensor_parallel_size=1)`.

    Args:
        module: The root; its fp32 parameters stay the master weights.
        mesh: One dimension, or several of which one is named `data_parallel`.
        blocks: Class names of the blocks; None takes what transformers declares, an empty list
            shards the root alone.
        param_dtype: Of parameters in forward and backward; auto is bfloat16 on accelerators and
            float32 on CPUs.
        reduce_dtype: Of the gradients' reduction over ranks.
        reshard_after_forward: Free a block's full parameters between forward and backward. The
            root (embeddings and head) keeps its own in any case: backward begins with them.
        cpu_offload: Keep parameters, gradients and optimizer state in host memory (GPUs only).

    Returns:
        The same module.

    Raises:
        ConfigError: A block is not found, or a setting can't work on this device.
    """
    mesh = _data_parallel(mesh)
    if cpu_offload and mesh.device_type == "cpu":
        raise ConfigError("`cpu_offload` needs a GPU to offload from. Leave it out on the CPU.")
    compute = _dtype("param_dtype", param_dtype, mesh.device_type)
    reduce = _dtype("reduce_dtype", reduce_dtype, mesh.device_type)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for block in _find_blocks(module, blocks):
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(compute, reduce),
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
        )
    # The root's float inputs (temperatures) are no activations: rounding them would be wrong.
    policy = MixedPrecisionPolicy(compute, reduce, cast_forward_inputs=False)
    fully_shard(
        module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False
    )
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to it or to something inside."""
    return any(isinstance(each, FSDPModule) for each in module.modules())


def reshard(module: nn.Module) -> None:
    """Give back the full parameters that the root keeps after a forward without backward.

    Until then its parameters are plain tensors, not shards: to be called before anything looks at
    `parameters()` (state dicts do it by themselves).
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def unshard(module: nn.Module) -> None:
    """On a single rank, make the parameters in the compute dtype at once: block by block is slower.

    On several nothing is done, since no rank need have room for all; blocks are gathered as they
    are run. `reshard` gives the parameters back.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule) and _num_ranks(each) == 1:
            each.unshard()


def _num_ranks(module: nn.Module) -> int:
    first = next(module.parameters())
    return first.device_mesh.size() if isinstance(first, DTensor) else 1


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.ndim == 1:
        return mesh
    if MESH_DIMENSION not in (mesh.mesh_dim_names or ()):
        raise ConfigError(
            f"`mesh` must have a dimension {MESH_DIMENSION!r}, got {mesh.mesh_dim_names}."
        )
    return mesh[MESH_DIMENSION]


def _dtype(parameter: str, name: str, device_type: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device_type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"`{parameter}` must be one of auto, {', '.join(_DTYPES)}, got {name!r}.")
    return _DTYPES[name]


def _find_blocks(module: nn.Module, blocks: list[str] | None) -> list[nn.Module]:
    wanted = no_split_modules(module) if blocks is None else set(blocks)
    found = [m for m in module.modules() if type(m).__name__ in wanted and m is not module]
    missing = wanted - {type(m).__name__ for m in found} if blocks is not None else set()
    if missing:
        present = sorted({type(m).__name__ for m in module.modules()})
        raise ConfigError(
            f"`blocks` names {sorted(missing)}, which the model has not. It has: "
            f"{', '.join(present)}."
        )
    if blocks is None and not found:
        raise ConfigError(
            f"`blocks` must be given for {type(module).__name__}: transformers declares no decoder "
            "blocks in it. Name their classes, or pass [] to shard it as a whole."
        )
    return found
