"""Checkpoints: written whole or not at all, and restored from data alone.

Checkpoints that are whole or not there: written under another name, renamed at the end.

Lightning writes a file to the system's temporary folder first and moves it, which over file
systems is a copy that can stop in the middle; folders of shards it fills in place.

Reading checkpoints as data, never as code, and refusing in one sentence what is none of ours.

`torch.distributed.checkpoint` (DCP) unpickles whatever a folder of shards holds. Here its index is
read by an unpickler that knows DCP's own classes only, and all else with `weights_only=True`.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeGuard

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from typing_extensions import override

from lightning_grpo._compat_lightning import SelfDescribedLoadPlanner, load_whole_state
from lightning_grpo.errors import CheckpointError, ConfigError

METADATA = "meta.pt"
"""Lightning's name for what is not a shard in a folder of shards."""

Shapes = Mapping[str, tuple[int, ...]]

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
"""What DCP's writer puts into the index of a folder of shards, by module; and torch's dtypes."""


_UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, KeyError),
    *(AttributeError, ImportError, IndexError, TypeError, ValueError, CheckpointException),
    *(MemoryError, OverflowError),  # a few bytes can claim to be followed by a terabyte
)
"""What torch and pickle raise for files that are no checkpoints, cut off or made up."""

_NAMED = re.compile(r"GLOBAL `?([\w.]+)")
"""What torch's own reader of plain data refuses to import."""


class _IndexUnpickler(pickle.Unpickler):
    """Builds the parts of an index and nothing else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError("its index " + _names(f"{module}.{name}"))


def _names(path: str) -> str:
    return (
        f"names `{path}`, which no checkpoint holds: it may have been made to run a program, and "
        "nothing of it was run"
    )


class ShardReader(FileSystemReader):
    """DCP's reader of a folder, which takes the index for a stranger's."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        with (Path(self.path) / name).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("its index is none of torch.distributed.checkpoint's")
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(
                    f"its index names a file outside of its folder, {stored.relative_path!r}"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainBytes:
    """What is no tensor (an optimizer's settings): plain data, where DCP unpickles anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)  # type: ignore[misc]


class _Planner(_PlainBytes, DefaultLoadPlanner):
    pass


class _WholePlanner(_PlainBytes, SelfDescribedLoadPlanner):
    pass


def load_shards(state: dict[str, Any], path: Path) -> None:
    """Fill a state (sharded or not) from a folder of shards, each rank its part."""
    load(state, storage_reader=_checked_reader(path), planner=_Planner())


def whole_state(path: Path) -> dict[str, Any]:
    """All that a folder of shards holds, in this process alone."""
    return load_whole_state(_checked_reader(path), _WholePlanner()) | read_plain(path / METADATA)


def _checked_reader(path: Path) -> ShardReader:
    """A reader whose index can be read: of one that can't, DCP itself would log tracebacks."""
    reader = ShardReader(path)
    reader.read_metadata()
    return reader


def read_plain(path: Path) -> dict[str, Any]:
    """A file of plain data and tensors."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


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
def reading(path: str | Path, parameter: str = "ckpt_path") -> Iterator[None]:
    """What torch says of a file that is no checkpoint, as a refusal of that path."""
    try:
        yield
    except _UNREADABLE as error:
        first: BaseException = error
        if isinstance(error, CheckpointException):  # what went wrong on each rank
            first = next(iter(error.failures.values()))[0]
        raise ConfigError(
            f"`{parameter}` {str(path)!r} can't be read as a checkpoint: {_said(first)}. Name "
            "another."
        ) from error


def _said(error: BaseException) -> str:
    """The first line of an error; torch's own advice, to run what a file says, is left out."""
    text = str(error).strip()
    if not text.startswith("Weights only load failed"):
        return text.partition("\n")[0] or type(error).__name__
    named = _NAMED.search(text)
    return "it " + _names(named[1]) if named else "it is of another format, or damaged"


def require_state(
    checkpoint: Mapping[str, Any], path: str | Path, parameter: str = "ckpt_path"
) -> None:
    """Refuse a file that torch reads and that is not a Trainer's checkpoint."""
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        raise ConfigError(
            f"`{parameter}` {str(path)!r} is not a checkpoint of a Trainer (weights alone?). To "
            "start from a model's weights set `model.model` to a Hugging Face folder."
        )


def saved_shapes(path: str | Path) -> Shapes:
    """Shapes of the module's parameters in a checkpoint, without reading them."""
    if is_sharded(path):
        entries = ShardReader(path).read_metadata().state_dict_metadata
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


def forget_foreign_paths(checkpoint: Mapping[str, Any], folders: Iterable[str]) -> None:
    """Leave out what a checkpoint calls earlier ones of its run, and what can't be one of them.

    `ModelCheckpoint` removes those that it replaces. It looks whether they are in its folder, but
    not through `..`, nor at any other file system than the usual one, which has other names, too.

    Args:
        checkpoint: Its callbacks' states are changed.
        folders: Of the `ModelCheckpoint`s that go on from it.
    """

    def kept(path: Any) -> bool:
        if not isinstance(path, str) or ".." in Path(path).parts:
            return False
        rests = [path.removeprefix(f"{folder}/") for folder in folders]
        return not all(":" in rest for rest in (path, *rests))

    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict):
            continue
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if name in state and not kept(state[name]):
                state[name] = ""
        if "best_k_models" in state:
            best = state["best_k_models"]
            state["best_k_models"] = {path: best[path] for path in best if kept(path)}


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
            self.failed(path, why_unwritten(error))
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


def save_as_last(trainer: L.Trainer, path: str) -> None:
    """Save beside what `ModelCheckpoint` saves, and have its `last` lead here; collective.

    A Trainer's own `ckpt_path="last"` knows no other: it would take the one before, and this one
    would stay on the disk for good.
    """
    keepers = [c for c in trainer.checkpoint_callbacks if _keeps_last(c)]
    for keeper in keepers:  # before it is saved, for it is part of the state
        folder, last = Path(str(keeper.dirpath)), keeper.last_model_path
        if Path(last).parent != folder:  # none yet, or a stranger's
            last = free_path(folder, keeper.CHECKPOINT_NAME_LAST)
        keeper.last_model_path = trainer.strategy.broadcast(last)
    trainer.save_checkpoint(path, weights_only=False)
    if trainer.is_global_zero and Path(path).exists():
        for keeper in keepers:
            _link(Path(keeper.last_model_path), Path(path).absolute())


def _link(last: Path, path: Path) -> None:
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        with replacing(last) as link:
            link.symlink_to(os.path.relpath(path, last.parent))
    except OSError as error:  # a file system may have no links
        log.warning("%s can't lead to %s: %s", last, path, why_unwritten(error))


def _keeps_last(callback: Any) -> TypeGuard[ModelCheckpoint]:
    if not isinstance(callback, ModelCheckpoint) or callback.save_weights_only:
        return False
    return bool(callback.save_last and callback.dirpath) and "://" not in str(callback.dirpath)


def free_path(folder: Path, name: str) -> str:
    """A checkpoint's path that is nobody's yet: runs without a logger share a folder."""
    versions = (f"-v{number}" if number else "" for number in itertools.count())
    paths = (folder / f"{name}{version}.ckpt" for version in versions)
    return str(next(path for path in paths if not path.exists()))


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


def why_unwritten(error: BaseException) -> str:
    """What kept a file from being written, in a line."""
    if "inline_container" in str(error):  # torch names the place in its own code, and no cause
        return "the disk took only a part of it; it is full, or a quota is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".splitlines()[0]


def first_error(error: BaseException | None) -> str:
    """What went wrong on the first rank where something did; the same on all; empty if nothing."""
    said = "" if error is None else why_unwritten(error)
    everywhere = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    return next((each for each in everywhere if each), "")
