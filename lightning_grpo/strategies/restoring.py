"""What can't be resumed from, refused in one sentence: no checkpoint, or another model's."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_grpo.errors import ConfigError

METADATA = "meta.pt"
"""Lightning's name for what is not a shard in a folder of shards."""

Shapes = Mapping[str, tuple[int, ...]]


def require_checkpoint(path: str | Path) -> None:
    """Refuse a path where no checkpoint lies: neither a file nor a folder of shards.

    Raises:
        ConfigError: What lies there instead.
    """
    if "://" in str(path):  # not a file system of this machine
        return
    found = Path(path)
    if not found.exists():
        raise ConfigError(f"`ckpt_path` must name a checkpoint, and there is no {str(path)!r}.")
    if found.is_dir() and not is_sharded(found):
        inside = sorted(found.rglob("*.ckpt"))
        nearest = f"In it lies {str(inside[-1])!r}." if inside else "Checkpoints end in `.ckpt`."
        raise ConfigError(
            f"`ckpt_path` must name a checkpoint, a file or a folder of shards, and {str(path)!r} "
            f"is a folder without {METADATA}. {nearest}"
        )


def require_readable(path: str | Path) -> None:
    """Refuse a file that torch did not write, without reading it.

    Raises:
        ConfigError: It is none, or its end is missing.
    """
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise ConfigError(
            f"`ckpt_path` {str(path)!r} can't be read as a checkpoint: it is of another format, or "
            "cut off. Name another one."
        )


def is_sharded(path: str | Path) -> bool:
    """Whether it is a folder of shards."""
    return (Path(path) / METADATA).is_file()


def refuse_shards(path: str | Path) -> None:
    """Refuse a folder of shards where the strategy reads files only."""
    if is_sharded(path):
        raise ConfigError(
            f"`ckpt_path` {str(path)!r} is a folder of shards, which only FSDP2Strategy reads, on "
            "any number of ranks. Set `trainer.strategy: fsdp2`."
        )


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What torch says of a file that is no checkpoint, as a refusal of that path."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"`ckpt_path` {str(path)!r} can't be read as a checkpoint: {said[0]}. Name another one."
        ) from error


def require_state(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a file that torch reads and that is not a Trainer's checkpoint."""
    if "pytorch-lightning_version" not in checkpoint:
        raise ConfigError(
            f"`ckpt_path` {str(path)!r} is not a checkpoint of a Trainer (weights alone?). To "
            "start from a model's weights set `model.model` to a Hugging Face folder."
        )


def saved_shapes(path: str | Path) -> Shapes:
    """Shapes of the module's parameters in a checkpoint, without reading them."""
    if is_sharded(path):
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
        return {
            name.removeprefix("state_dict."): tuple(entry.size)
            for name, entry in entries.items()
            if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
        }
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    require_state(checkpoint, path)
    return shapes(checkpoint["state_dict"])


def shapes(state_dict: Mapping[str, Any]) -> Shapes:
    """Shapes of a module's state, sharded or not."""
    return {name: tuple(value.shape) for name, value in state_dict.items()}


def require_own_weights(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model than the one that was built.

    Of one in shards the strategy has seen to it.
    """
    own = shapes(module.state_dict())
    if own and module.strict_loading and "state_dict" in checkpoint:
        require_same_model(shapes(checkpoint["state_dict"]), own)


def require_same_model(saved: Shapes, own: Shapes) -> None:
    """Refuse a checkpoint whose parameters are not those of the module.

    Raises:
        ConfigError: With the first parameter that differs.
    """
    differing = [name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)]
    if differing:
        name = min(differing)
        raise ConfigError(
            "`ckpt_path` must be a checkpoint of the same model as `model.model`, and "
            f"{len(differing)} parameters differ: {name} is {_shown(saved.get(name))} in the "
            f"checkpoint and {_shown(own.get(name))} in the model. Set `model.model` to the model "
            "that the checkpoint was trained from."
        )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
