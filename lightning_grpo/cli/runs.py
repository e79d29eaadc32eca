"""Run folders: `runs/NAME/version_N`, with the loggers in them, and going on in the last one.

A command that reads a run writes nothing into it: `validate`, `test` and `replay` have folders of
their own kind beside it, `runs/NAME-validate/version_N`.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor

from lightning_grpo.session.folder import LOCK, hold_folder, hold_new_version
from lightning_grpo.strategies.checkpoints import is_sharded

log = logging.getLogger(__name__)

RUNS = "runs"
LAST = "last"
LAST_OR_NONE = "last-or-none"
"""Spellings of `--ckpt_path`: the newest checkpoint, and the same where there may be none yet."""
FIT = "fit"
METRICS = "metrics.csv"
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
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


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
        loggers.append(BoardLogger(root, name="", version=csv.version))
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


@dataclass
class Attempt:
    """How an attempt to write a file went."""

    failed: bool = False


@contextmanager
def going_on_without(what: object, silently: bool = False) -> Iterator[Attempt]:
    """Go on where a file can't be written (a full disk), with a line that says so."""
    attempt = Attempt()
    try:
        yield attempt
    except (OSError, ValueError) as error:
        # Lightning's loggers say of any exception that a value can't be logged.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        attempt.failed = True
        if not silently:
            why = cause.strerror or cause
            log.warning("%s can't be written (%s): the run goes on without it", what, why)


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


class CurveLogger(CSVLogger):
    """Lightning's CSVLogger, but it goes on with the curve that is there, which that deletes."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = CurveWriter(Path(self.log_dir))  # type: ignore[assignment]
        return self._experiment


class CurveWriter:
    """Writes rows behind those of the run so far; a disk that is full holds them back.

    A run that goes on from an earlier step takes its steps again: their old rows are put aside into
    `metrics-0.csv`, so that there is one row for each.

    Args:
        folder: Of the run.

    Attributes:
        metrics: Rows that are not written yet.
    """

    def __init__(self, folder: Path) -> None:
        self.metrics: list[dict[str, Any]] = []
        self._folder, self._file = folder, folder / METRICS
        self._hparams: dict[str, Any] = {}
        self._columns: list[str] | None = None
        self._aside: Path | None = None
        self._failed = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row."""
        plain = {n: v.item() if isinstance(v, Tensor) else v for n, v in metrics.items()}
        self.metrics.append(plain | {"step": step})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Keep the hyper-parameters beside the curve."""
        self._hparams |= params
        file = self._folder / "hparams.yaml"
        with going_on_without(file):
            self._folder.mkdir(parents=True, exist_ok=True)
            save_hparams_to_yaml(file, self._hparams)

    def save(self) -> None:
        """Write what was added; where that is not possible, say so once and try again later."""
        if not self.metrics:
            return
        with going_on_without(self._file, silently=self._failed) as attempt:
            self._write()
        if attempt.failed:
            self._failed = True
            return
        if self._failed:
            log.warning("%s is written again, with every row since", self._file)
        self._failed, self.metrics = False, []

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        columns = self._columns
        # A run of weeks has rows that fill gigabytes as dictionaries: they are never all in memory.
        rows: Iterable[dict[str, Any]] = _rows(self._file)
        if columns is None:
            columns, kept = _read(self._file)
            rows = self._put_aside(columns, kept)
        new = {name for row in self.metrics for name in row} - set(columns)
        if self._columns is not None and not new:
            _append(self._file, columns, self.metrics)
            return
        columns = sorted({*columns, *new})
        _write_rows(self._file, columns, itertools.chain(rows, self.metrics))
        self._columns = columns

    def _put_aside(self, columns: list[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows before the first new one; those that are taken again go beside the curve."""
        first = self.metrics[0]
        again = [row for row in rows if _is_taken_again(row, first)]
        if again:
            if self._aside is None:  # else a disk was full when they were put there
                number = len(list(self._folder.glob("metrics-*.csv")))
                self._aside = self._folder / f"metrics-{number}.csv"
            _write_rows(self._aside, columns, again)
        return [row for row in rows if not _is_taken_again(row, first)]


def _is_taken_again(row: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    step = int(row["step"])
    measured = {name for name, value in row.items() if value != ""}
    same = measured & set(first) - {"step", "epoch"}  # a step and its validation have a row each
    return step > first["step"] or (step == first["step"] and bool(same))


def _read(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows; none where there is no file."""
    if not file.exists():
        return [], []
    with file.open(newline="") as opened:
        columns = next(csv.reader(opened), [])
    return columns, list(_rows(file))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """One row after the other."""
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            # A disk that filled up may have cut the last one.
            if None not in row.values() and row["step"].isdigit():
                yield row


def _write_rows(file: Path, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """The whole file or none: a run that is killed here keeps what was there."""
    partial = file.with_name(f".{file.name}.tmp")
    try:
        with partial.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, columns)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _append(file: Path, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """All rows or none."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    data = text.getvalue().encode()
    with file.open("ab", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[opened.write(data) :]
        except OSError:
            os.truncate(file, size)
            raise
