"""A session's state as a checkpoint holds it, and which settings it holds for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_grpo.errors import ConfigError

_WHY = {
    "batch_size": "versions are counted in batches",
    "group_size": "finished groups go on with the run",
    "minibatches_per_batch": "the Trainer's steps are counted by it",
    "passes_per_batch": "the Trainer's steps are counted by it",
}
_WHY_PROMPTS = "a position in the stream would be another prompt"
"""Settings of the data module that a checkpoint's positions and counts depend on."""


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


def require_same(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on where the checkpoint's positions would mean something else.

    Args:
        saved: Settings of the checkpoint's run that matter.
        given: The same of this run.

    Raises:
        ConfigError: The first that differs.
    """
    for name, value in saved.items():
        if given.get(name, value) != value:
            why = _WHY.get(name, _WHY_PROMPTS)
            raise ConfigError(
                f"`data.{name}` must be what the checkpoint's run had ({why}), {value}, got "
                f"{given[name]}. Set it back, or begin a new run from these weights: "
                "`lightning-grpo export` the checkpoint and set `model.model` to the folder."
            )


def require_own(checkpoint: Mapping[str, Any], name: str) -> None:
    """Refuse to go on from a checkpoint without a state of this run's data module.

    Lightning keeps it under the name of the class, and passes over one of another name.

    Args:
        checkpoint: The whole of it.
        name: Of this run's class.

    Raises:
        ConfigError: Which class the checkpoint's run had.
    """
    if name not in checkpoint:
        others = [k for k, v in checkpoint.items() if isinstance(v, Mapping) and "run_id" in v]
        raise ConfigError(
            "`data` must be of the class that the checkpoint's run had (the prompts would begin "
            f"anew), {', '.join(others) or 'none of ours'}, got {name}. Set it back, or begin a "
            "new run from these weights: `lightning-grpo export` the checkpoint and set "
            "`model.model` to the folder."
        )
