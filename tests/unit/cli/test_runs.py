"""Which checkpoint `--ckpt_path last` means, and one curve for a run that goes on."""

from __future__ import annotations

import csv
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_grpo.callbacks.curve import CurveKeeper, CurveWriter
from lightning_grpo.cli.runs import (
    BoardLogger,
    board_tells_itself,
    folder_beside,
    last_checkpoint,
    version_of,
)


def make(path, age_s):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (10_000 - age_s, 10_000 - age_s))
    return path


def test_the_checkpoint_of_a_stopped_run_counts_when_it_is_the_newest(tmp_path):
    make(tmp_path / "version_0/checkpoints/epoch=0-step=20.ckpt", age_s=5)
    make(tmp_path / "version_1/checkpoints/epoch=0-step=10.ckpt", age_s=3)
    stopped = make(tmp_path / "hpc_ckpt_1.ckpt", age_s=1)
    assert last_checkpoint(tmp_path) == stopped
    assert version_of(stopped) == 1


def test_an_older_stop_does_not_hide_a_newer_checkpoint(tmp_path):
    make(tmp_path / "hpc_ckpt_1.ckpt", age_s=9)
    newest = make(tmp_path / "version_2/checkpoints/final-step=40.ckpt", age_s=1)
    assert last_checkpoint(tmp_path) == newest
    assert version_of(newest) == 2


def log_rows(folder, *rows):
    """Rows of (step, metrics), as one start of a run writes them."""
    writer = CurveWriter(folder)
    for step, metrics in rows:
        writer.log_metrics(metrics, step)
        writer.save()
    return writer


def rows_of(file):
    with file.open(newline="") as opened:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(opened)]


def test_a_run_that_goes_on_has_one_curve(tmp_path):
    log_rows(tmp_path, (0, {"eval": 0.1}), (1, {"loss": torch.tensor(2.0)}), (2, {"loss": 1.5}))
    log_rows(tmp_path, (3, {"loss": 1.0, "new": 7}), (4, {"loss": 0.5}))
    assert rows_of(tmp_path / "metrics.csv") == [
        {"step": "0", "eval": "0.1"},
        {"step": "1", "loss": "2.0"},
        {"step": "2", "loss": "1.5"},
        {"step": "3", "loss": "1.0", "new": "7"},
        {"step": "4", "loss": "0.5"},
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_steps_that_are_taken_again_are_in_the_curve_once_and_kept_beside(tmp_path):
    log_rows(tmp_path, (1, {"loss": 3}), (2, {"loss": 2}), (2, {"eval": 0.5}), (3, {"loss": 1}))
    log_rows(tmp_path, (2, {"loss": 9}), (3, {"loss": 8}))
    steps = [(row["step"], row.get("loss")) for row in rows_of(tmp_path / "metrics.csv")]
    assert steps == [("1", "3"), ("2", None), ("2", "9"), ("3", "8")]
    assert [row["loss"] for row in rows_of(tmp_path / "metrics-0.csv")] == ["2", "1"]


def test_a_row_that_a_full_disk_has_cut_does_not_stop_the_curve(tmp_path):
    log_rows(tmp_path, (1, {"loss": 3, "rate": 1}))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,")
    log_rows(tmp_path, (2, {"loss": 2, "rate": 1}))
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["1", "2"]


def test_a_disk_that_fills_up_holds_the_curve_back_and_says_so_once(tmp_path, caplog):
    writer = log_rows(tmp_path, (1, {"loss": 1}))
    whole = rows_of(tmp_path / "metrics.csv")
    size = (tmp_path / "metrics.csv").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2, limits[1]))
    try:
        for step, metrics in ((2, {"loss": 22}), (3, {"loss": 33, "another column": 1})):
            writer.log_metrics(metrics, step)
            writer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rows_of(tmp_path / "metrics.csv") == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "metrics.csv can't be written" in caplog.text
    writer.log_metrics({"loss": 44}, 4)
    writer.save()
    steps = [row["step"] for row in rows_of(tmp_path / "metrics.csv")]
    assert steps == ["1", "2", "3", "4"]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_disk_that_is_full_when_a_run_goes_on_leaves_no_pieces_beside_the_curve(tmp_path):
    log_rows(tmp_path, *((step, {"loss": step}) for step in (1, 2, 3)))
    writer = CurveWriter(tmp_path)
    writer.log_metrics({"loss": 20}, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        for _ in range(3):
            writer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["metrics.csv"]
    writer.save()
    assert sorted(os.listdir(tmp_path)) == ["metrics-0.csv", "metrics.csv"]
    assert [row["loss"] for row in rows_of(tmp_path / "metrics-0.csv")] == ["2", "3"]
    assert [row["loss"] for row in rows_of(tmp_path / "metrics.csv")] == ["1", "20"]


def test_tensorboard_s_files_end_with_one_line_and_not_the_run(tmp_path, caplog, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with board_tells_itself():
        board = BoardLogger(tmp_path, name="", version=0)
        board.log_metrics({"loss": 1.0}, 1)
        board.save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            for step in range(2, 5):
                board.log_metrics({"loss": 1.0}, step)
                board.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        board.finalize("success")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "TensorBoard's files in" in caplog.text
    assert capsys.readouterr().err.count("Traceback") == 0


def test_what_reads_a_run_writes_beside_it_and_not_beside_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_beside(Path("runs/a"), "fit") == Path("runs/a")
    assert folder_beside(Path("runs/a"), "replay") == Path("runs/a-replay")
    assert folder_beside(Path("runs/a-replay"), "replay") == Path("runs/a-replay")
    assert folder_beside(Path(), "validate") == Path("validate")
    assert folder_beside(tmp_path.parent, "test") == tmp_path.parent / "test"


class Anywhere(Logger):
    """A service's."""

    name, version = "anywhere", "1"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.parametrize(
    ("logger", "stage", "curves"),
    [
        ("service", "fit", 1),
        ("service", "validate", 0),
        (False, "fit", 0),
        ("csv", "fit", 1),
    ],
)
def test_a_run_that_is_logged_anywhere_has_its_curve_in_its_folder(tmp_path, logger, stage, curves):
    made = {"service": Anywhere(), "csv": CSVLogger(tmp_path, name="", version="")}
    trainer = L.Trainer(logger=made.get(logger, logger), accelerator="cpu", barebones=False)
    trainer.datamodule = SimpleNamespace(run_dir=tmp_path)
    CurveKeeper().setup(trainer, L.LightningModule(), stage)
    for each in trainer.loggers:
        each.log_metrics({"reward/mean": 0.5}, 1)
        each.save()
    assert len([each for each in trainer.loggers if isinstance(each, CSVLogger)]) == curves
    assert (tmp_path / "metrics.csv").exists() == bool(curves)
