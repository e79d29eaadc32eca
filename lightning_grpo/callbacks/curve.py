"""The curve of a run: `metrics.csv` in its folder, whatever else it is logged to."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_grpo.contract import run_folder

log = logging.getLogger(__name__)

METRICS = "metrics.csv"


class CurveKeeper(Callback):
    """Has a run that is logged anywhere keep its curve in its own folder, too.

    `lightning-grpo report` and people who have only the folder read it there. A Trainer whose
    logging is off (`logger=False`, `fast_dev_run`) keeps none.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add the logger, unless the trainer has one that writes the file."""
        loggers: list[Any] = trainer.loggers
        wanted = bool(loggers) and stage == TrainerFn.FITTING and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if wanted and not any(isinstance(each, CSVLogger) for each in loggers):
            # Every row at once: a run that is killed keeps its curve.
            folder = run_folder(trainer)
            curve = CurveLogger(folder, name="", version="", flush_logs_every_n_steps=1)
            trainer.loggers = [*loggers, curve]


def prepare_loggers(trainer: L.Trainer) -> None:
    """Keep Lightning's loggers from losing what they are given, or have.

    To be called before Lightning asks them for what they write with: CSVLogger then deletes the
    curve that is in its folder already. That of a run goes on here, and a validation or test beside
    it has a file of its own. MLFlowLogger leaves out the letters that MLflow doesn't take, until
    two names are one, or none.
    """
    for logger in trainer.loggers:
        if isinstance(logger, MLFlowLogger) and "log_metrics" not in vars(logger):
            logger.log_metrics = _in_ascii(logger.log_metrics)  # type: ignore[method-assign]
    job = trainer.state.fn or TrainerFn.FITTING
    for logger in trainer.loggers if trainer.is_global_zero else ():
        # A subclass writes in its own way; a bucket is no folder.
        if type(logger) is not CSVLogger or logger._experiment or "://" in logger.save_dir:
            continue
        folder = Path(logger.log_dir)
        other = job is not TrainerFn.FITTING and (folder / METRICS).exists()
        name = f"metrics-{job.value}.csv" if other else METRICS
        logger._experiment = CurveWriter(folder, name)  # type: ignore[assignment]


def _in_ascii(log_metrics: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(log_metrics)
    def log(metrics: Mapping[str, float], step: int | None = None) -> None:
        log_metrics({mlflow_name(name): value for name, value in metrics.items()}, step)

    return log


def mlflow_name(name: str) -> str:
    """A name that MLflow takes: the path of a file, in a few characters of ASCII."""
    parts = name.encode("ascii", "backslashreplace").decode().split("/")
    legal = (re.sub(r"[^\w.-]+", "_", part) for part in parts)
    return "/".join(part if part.strip(".") else "_" for part in legal)


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
        name: Of the file.

    Attributes:
        metrics: Rows that are not written yet.
    """

    def __init__(self, folder: Path, name: str = METRICS) -> None:
        self.metrics: list[dict[str, Any]] = []
        self._folder, self._file = folder, folder / name
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
