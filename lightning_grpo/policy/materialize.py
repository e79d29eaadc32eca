"""Values for a policy that was built on the meta device, sharded or not.

`to_empty` leaves garbage in buffers that checkpoints don't hold (the rotary embedding's
frequencies): the model would run and be wrong, so they are made again here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.load import load_policy


def materialize_from_folder(
    model: PreTrainedModel,
    folder: str,
    *,
    device: torch.device | str = "cpu",
    model_kwargs: dict[str, Any] | None = None,
    adapt: Callable[[PreTrainedModel], None] | None = None,
) -> None:
    """Fills a meta model (after `fully_shard`, if it is sharded) with a checkpoint's values.

    With several ranks it is a collective: rank 0 reads, the others receive their shards.

    Args:
        model: Built by `load_policy(..., meta=True)`.
        folder: Hub id or folder of the checkpoint.
        device: Where this rank computes.
        model_kwargs: As `load_policy` had them (`revision`, ...).
        adapt: What was done to the model after it was built (`LoRA.add_to`); new parameters get
            their first values so.

    Raises:
        ConfigError: The checkpoint lacks a parameter, or a buffer can't be made again; on every
            rank.
    """
    model.to_empty(device=device)
    model.tie_weights()
    many = distributed.is_initialized() and distributed.get_world_size() > 1
    values: dict[str, Any] = {}
    failed: Exception | None = None
    if not many or distributed.get_rank() == 0:
        try:
            values = _read(model, folder, model_kwargs, adapt)
        except Exception as error:  # noqa: BLE001 - raised below, on every rank
            failed = error
    _raise_everywhere(failed, many)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=many, strict=False)
    set_model_state_dict(model, values, options=options)
    rebuild_buffers(model)


def rebuild_buffers(model: PreTrainedModel) -> None:
    """Makes the buffers that no checkpoint holds again, in place.

    Raises:
        ConfigError: A module has such buffers and isn't built from the config alone.
    """
    for name, module in model.named_modules():
        names = module._non_persistent_buffers_set
        if not names:
            continue
        fresh = _fresh(name, module)
        for buffer in names:
            value: Tensor | None = fresh.get_buffer(buffer)
            current = module.get_buffer(buffer)
            if value is not None:
                with torch.no_grad():
                    current.copy_(value.to(current.dtype))


def _raise_everywhere(failed: Exception | None, many: bool) -> None:
    """Raise rank 0's error on every rank: the others would wait for values that never come."""
    box = [None if failed is None else str(failed) or repr(failed)]
    if many:
        distributed.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    if box[0] is not None:
        raise ConfigError(box[0])


def _fresh(name: str, module: nn.Module) -> nn.Module:
    parameters = inspect.signature(type(module)).parameters
    config = module.__dict__.get("config")
    if config is None or "config" not in parameters:
        raise ConfigError(
            f"`model` has buffers in `{name}` ({type(module).__name__}) that its checkpoint lacks "
            "and that can't be made again. Way out: load it without the meta device."
        )
    with torch.device("cpu"):
        return type(module)(config=config)


def _read(
    model: PreTrainedModel,
    folder: str,
    model_kwargs: dict[str, Any] | None,
    adapt: Callable[[PreTrainedModel], None] | None,
) -> dict[str, Tensor]:
    source = load_policy(folder, dtype=model.dtype, model_kwargs=model_kwargs)
    if adapt is not None:
        adapt(source)
    values: dict[str, Tensor] = source.state_dict()
    missing = sorted(set(model.state_dict()) - set(values))
    if missing:
        raise ConfigError(
            f"`model` must hold every parameter, {folder!r} lacks {missing[0]} and "
            f"{len(missing) - 1} more. Way out: a complete checkpoint of the same architecture."
        )
    return values
