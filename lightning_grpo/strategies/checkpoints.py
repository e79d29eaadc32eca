"""Checkpoints that are whole or not there: written under another name, renamed at the end.

Lightning writes a file to the system's temporary folder first and moves it, which over file
systems is a copy that can stop in the middle; folders of shards it fills in place.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.strategies.restoring import (
    reading,
    refuse_shards,
    require_checkpoint,
    require_state,
)

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its final name; what was there before stays until then.

    Runs use it unless the Trainer has another: `trainer.plugins: [AtomicCheckpointIO]`.

    Args:
        on_failure: What to do when a checkpoint can't be written (a full disk): `stop` ends the
            run, `continue` says so and goes on. The checkpoint before it stays in either case.
    """

    def __init__(self, on_failure: Literal["stop", "continue"] = "stop") -> None:
        if on_failure not in ("stop", "continue"):
            raise ConfigError(f"`on_failure` must be stop or continue, got {on_failure!r}.")
        self.on_failure = on_failure
        self._failed = False

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):  # not a file system of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            self.failed(path, str(error))
        else:
            self.succeeded()

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        require_checkpoint(path)
        refuse_shards(path)
        # Of a URL Lightning would otherwise run what it downloads.
        safe = True if weights_only is None else weights_only
        with reading(path):
            checkpoint = super().load_checkpoint(path, map_location, safe)
        require_state(checkpoint, path)
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        if self._failed:
            log.warning("keeping %s: the checkpoint after it could not be written", path)
            return
        super().remove_checkpoint(path)

    def succeeded(self) -> None:
        """A checkpoint was written: older ones may go."""
        self._failed = False

    def failed(self, path: Path, reason: str) -> None:
        """A checkpoint could not be written: stop the run, or go on and keep older ones.

        Raises:
            CheckpointError: If the run is to stop.
        """
        self._failed = True
        message = (
            f"the checkpoint {str(path)!r} can't be written: {reason}. The one before it is whole. "
            "Free space there, or set `dirpath` of ModelCheckpoint."
        )
        if self.on_failure == "stop":
            raise CheckpointError(message)
        log.error("%s The run goes on.", message)


def use_atomic_checkpoints(trainer: Trainer) -> None:
    """Take the place of Lightning's default, and of nothing else."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to (file or folder); takes its place if the block succeeds."""
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    try:
        yield partial
        replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def replace(partial: Path, path: Path) -> None:
    """Put a finished file or folder in the place of another."""
    if not (partial.is_dir() or path.is_dir()):
        partial.replace(path)
        return
    before = path.with_name(f".{path.name}.before")
    remove(before)
    if path.exists() or path.is_symlink():
        path.rename(before)  # a folder can't be replaced in one move
    partial.rename(path)
    remove(before)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def first_error(error: BaseException | None) -> str:
    """What went wrong on the first rank where something did; the same on all; empty if nothing."""
    said = "" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
    everywhere = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    return next((each for each in everywhere if each), "")
