"""The policy's tensors under its model's own names: gathered, rounded, in buckets."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import Protocol, runtime_checkable

from lightning_grpo.errors import WeightSyncError

WRAPPER_PARTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What `torch.compile`, activation checkpointing and FSDP put into names, at any depth."""
ADAPTED_PART = "base_layer"
"""What PEFT puts into the names of a layer's own weights beside an adapter."""
ADAPTER_PARTS = ("lora_A", "lora_B")
"""The adapter's own parameters, which are no part of the checkpoint."""
TIED_HEAD = "lm_head.weight"


def plain_name(name: str) -> str:
    """The name without the parts that wrappers put in."""
    left_out = (*WRAPPER_PARTS, ADAPTED_PART)
    return ".".join(part for part in name.split(".") if part not in left_out)


def pretrained_prefix(module: nn.Module) -> str:
    """Where the Hugging Face model sits inside `module`: `""`, `"model."`, `"policy.model."`, ...

    It is the outermost `PreTrainedModel`. A module without one is taken as it is.
    """
    # Here, not above: transformers takes seconds to import, and plain modules don't need it.
    from transformers import PreTrainedModel

    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel):
            return f"{name}." if name else ""
    return ""


def ties_head(module: nn.Module) -> bool:
    """Whether the output layer is the embedding, so that the checkpoint holds it once."""
    from transformers import PreTrainedModel

    for child in module.modules():
        if isinstance(child, PreTrainedModel):
            return bool(child.config.get_text_config().tie_word_embeddings)
    return False


def plain_names(names: Iterable[str], prefix: str, *, tied: bool) -> dict[str, str]:
    """Maps names within wrappers to those within the Hugging Face model; tied weights appear once.

    Adapters are left out: `gather_weights` adds them to the weights that they belong to.

    Args:
        names: As `named_parameters` gives them.
        prefix: Where the Hugging Face model sits; what lies outside it is left out.
        tied: Leave the output layer out.
    """
    mapped: dict[str, str] = {}
    for name in names:
        if not name.startswith(prefix) or not set(ADAPTER_PARTS).isdisjoint(name.split(".")):
            continue
        target = plain_name(name.removeprefix(prefix))
        if not (tied and target == TIED_HEAD):
            mapped[name] = target
    return mapped


_FP32_BITS = 23


def round_by_chance(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rounds up or down, the nearer the likelier, so that the mean over elements is kept.

    Stochastic rounding (Gupta et al., "Deep Learning with Limited Numerical Precision",
    arXiv 1502.02551, section 3). A value that `dtype` can hold stays itself. The draw depends on
    `name` and the place in the tensor alone: equal values always round alike.

    Args:
        values: fp32.
        dtype: bf16 or fp16; others round to the nearest.
        name: Of the parameter; others draw independently of it.

    Returns:
        The same shape, in `dtype`; what is not finite stays so.
    """
    lost = _num_lost_bits(dtype)
    if values.dtype != torch.float32 or lost <= 0:
        return values.to(dtype)
    generator = torch.Generator(values.device).manual_seed(zlib.crc32(name.encode()))
    draw = torch.randint(
        1 << lost, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    # The bits that are lost, as a number, are the chance of rounding away from zero: a carry.
    bits = values.contiguous().view(torch.int32).add(draw).bitwise_and_(-(1 << lost))
    rounded = bits.view(torch.float32)
    # A NaN of all ones, which is CUDA's, would carry into the sign and be a zero.
    return rounded.where(values.isfinite(), values).to(dtype)


def _num_lost_bits(dtype: torch.dtype) -> int:
    if not dtype.is_floating_point:
        return 0
    return _FP32_BITS - round(-torch.tensor(torch.finfo(dtype).eps).log2().item())


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


def wire_bytes(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """About how many bytes `gather_weights` returns."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in module.parameters())


@torch.no_grad()
def gather_weights(
    module: nn.Module,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    keep: bool = True,
    into: Mapping[str, Tensor] | None = None,
) -> Mapping[str, Tensor]:
    """Copies every weight, whole, in the servers' dtype, under the model's own names.

    Collective where parameters are sharded: every rank must call it. Shards are cast before they
    are gathered, so that no more travels than needed. The copies share no memory with the model,
    which may train on while they are sent. Adapters are merged before the cast, in the parameters'
    own precision, so that servers need not know of them. What an adapter adds may be far below half
    a unit of `dtype`, so that no weight would change by rounding to the nearest: merged weights are
    rounded by chance instead, and the servers compute on average what the trainer does.

    Buffers that a checkpoint holds (the bias that balances experts) come last, in their own dtype.

    Args:
        module: The policy, plain, wrapped, or sharded by `fully_shard`.
        dtype: Of the servers; None keeps each parameter's own.
        device: Where the copies go; None keeps each parameter's own.
        keep: Whether this rank wants the result (rank 0 does); the others get an empty dict.
        into: What an earlier call returned: its memory is written to, and it is returned.
    """
    _reshard(module)
    parameters, prefix = dict(module.named_parameters()), pretrained_prefix(module)
    names = plain_names(parameters, prefix, tied=ties_head(module))
    buffers = _kept_buffers(module, prefix) if keep else {}
    copies: Mapping[str, Tensor] = into or {}
    if keep and into is None:
        wanted = {target: parameters[name] for name, target in names.items()}
        copies = empty_run(wanted, dtype, device) | empty_run(buffers, None, device)
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
    for name, value in buffers.items():
        copies[name].copy_(value)
    return copies


def _kept_buffers(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Numbers that a checkpoint holds beside the parameters, by their plain names."""
    buffers = {
        f"{path}.{name}" if path else name: value
        for path, child in module.named_modules()
        for name, value in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set and value.is_floating_point()
    }
    return {target: buffers[n] for n, target in plain_names(buffers, prefix, tied=False).items()}


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
