"""Run folders: `runs/NAME/version_N`, with the loggers in them, and going on in the last one.

A command that reads a run writes nothing into it: `validate`, `test` and `replay` have folders of
their own kind beside it, `runs/NAME-validate/version_N`.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache

from lightning_grpo.callbacks.curve import CurveLogger, going_on_without
from lightning_grpo.session.folder import LOCK, hold_folder, hold_new_version
from lightning_grpo.strategies.checkpoints import is_sharded

log = logging.getLogger(__name__)

RUNS = "runs"
LAST = "last"
LAST_OR_NONE = "last-or-none"
"""Spellings of `--ckpt_path`: the newest checkpoint, and the same where there may be none yet."""
FIT = "fit"
_VERSION = "version_"


def last_checkpoint(root: Path, folders: Iterable[Path] = ()) -> Path | None:
    """The checkpoint that `--ckpt_path last` means: the newest below `root`, if there is one.

    Lightning looks in the new run's own folder, which is empty. A run that a signal stopped has
    left its last one in `root` itself, one without a logger in `root/checkpoints`.

    Args:
        root: The folder of the run's versions.
        folders: Others that checkpoints of this run go to.
    """
    own = (root / "checkpoints", *root.glob("version_*/checkpoints"), *folders)
    # A metric's name in `filename` may hold a slash, which makes a folder.
    found = {
        *root.glob("hpc_ckpt_*.ckpt"),
        *(path for each in own for path in each.rglob("*.ckpt")),
    }
    whole = [path for path in found if path.is_file() or is_sharded(path)]
    # A link of `save_last` is as new as what it leads to.
    return max(whole, key=lambda p: (p.stat().st_mtime, not p.is_symlink()), default=None)


def version_of(checkpoint: Path, root: Path | None = None) -> int:
    """The N of the `version_N` folder that a checkpoint belongs to.

    Args:
        checkpoint: Somewhere in the folder, or elsewhere: then it belongs to the newest version.
        root: The folder of the run's versions; None: the checkpoint lies in it.
    """
    for folder in checkpoint.parents:
        if folder.name.startswith(_VERSION):
            return _number(folder)
    return max(map(_number, (root or checkpoint.parent).glob(f"{_VERSION}*")), default=0)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(_VERSION))


def folder_beside(folder: Path, kind: str) -> Path:
    """Where a command of another kind than `fit` writes what `fit` writes to a folder.

    Args:
        folder: `fit`'s.
        kind: `validate`, `test` or `replay`.
    """
    if kind == FIT or folder.name.endswith(f"-{kind}"):  # that of the config of such a command
        return folder
    if Path.cwd().is_relative_to(folder.resolve()):  # nobody wants one beside the current folder
        return folder / kind
    return folder.with_name(f"{folder.name}-{kind}")


def move_beside(trainer: Any, kind: str) -> None:
    """Have the callbacks and loggers of a Trainer's config write beside the run that is read."""
    for each in (*listed(trainer.callbacks), *listed(trainer.logger)):
        settings = each.get("init_args") or {}
        for name in ("dirpath", "folder", "save_dir"):
            if settings.get(name):
                settings[name] = str(folder_beside(Path(settings[name]), kind))


def listed(value: Any) -> list[Any]:
    """One object of a config, or several; what is no object is left out."""
    several = value if isinstance(value, list) else [value]
    return [each for each in several if hasattr(each, "class_path")]


@contextmanager
def held_version(root: Path, version: int | None = None) -> Iterator[int]:
    """Have one `version_N` folder for a run's time; gives N. On the first rank alone.

    Args:
        root: The folder of the run's versions.
        version: The one to go on with; None makes a new one.

    Raises:
        ConfigError: Another run has it, or it can't be written to.
    """
    lock = hold_new_version(root) if version is None else hold_folder(root / f"{_VERSION}{version}")
    try:
        yield _number(lock.folder)
    except BaseException:
        remove_unused(lock.folder)
        raise
    finally:
        lock.release()


def default_loggers(root: Path, version: int | None) -> list[Logger]:
    """A CSV file, and TensorBoard where it is installed, in one `version_N` folder.

    Args:
        root: The folder of the run's versions.
        version: N; None on the ranks that don't write.
    """
    # Every row at once: a run that is killed keeps its curve.
    csv = CurveLogger(root, name="", version=version, flush_logs_every_n_steps=1)
    loggers: list[Logger] = [csv]
    if RequirementCache("tensorboard"):
        # Room for a step's scalars: the trainer would wait for the file at every tenth.
        loggers.append(BoardLogger(root, name="", version=csv.version, max_queue=1000))
    return loggers


def remove_unused(folder: Path) -> None:
    """Remove what loggers have put into the folder of a run that never began, if that is all."""
    empty = {folder / name for name in ("config.yaml", "hparams.yaml", LOCK)}
    # Servers may have been started before the refusal: their logs say nothing of it.
    logs = folder / "servers"
    made = set(folder.glob("events.out.tfevents.*")) | empty
    if folder.is_dir() and set(folder.iterdir()) <= made | {logs}:
        for file in made - {folder / LOCK}:
            file.unlink(missing_ok=True)
        shutil.rmtree(logs, ignore_errors=True)


class BoardLogger(TensorBoardLogger):
    """TensorBoard's files, as far as they can be written: once one can't, the run has no more."""

    _failed = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Add scalars."""
        self._try(super().log_metrics, *args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keep the hyper-parameters."""
        self._try(super().log_hyperparams, *args, **kwargs)

    def save(self) -> None:
        """Write what was added."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """Close the files."""
        self._try(super().finalize, status)

    def _try(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if not self._failed:
            with going_on_without(f"TensorBoard's files in {self.log_dir}") as attempt:
                write(*args, **kwargs)
            self._failed = attempt.failed


@contextmanager
def board_tells_itself() -> Iterator[None]:
    """Keep TensorBoard's thread from printing a traceback of what `BoardLogger` says in a line."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        of_board = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
