from __future__ import annotations

import threading
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.recording import TrajectoryWriter
from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.rollout.records import read_rows
from tests.fakes.recordings import read_groups
from tests.fakes.tiny_run import TinyData, TinyEvaluation, TinyModule, make_group


def test_each_rollout_batch_is_one_file_named_by_its_last_step(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=2))
    files = sorted((tmp_path / "trajectories").iterdir())
    assert [file.name for file in files] == ["step_000002.parquet", "step_000004.parquet"]
    assert [(row["step"], row["version"]) for row in read_rows(files[1])] == [(4, 1)] * 4


def test_what_was_consumed_can_be_read_back(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert read_groups(tmp_path) == [[make_group(0), make_group(1)]]


def test_each_trajectory_is_written_with_its_advantage(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    rows = read_rows(tmp_path / "trajectories")
    assert [(row["reward"], row["advantage"]) for row in rows] == [(0, -1), (1, 1)] * 2


def test_one_advantage_per_token_is_not_written(make_trainer, tmp_path):
    class PerToken(TinyData):
        def train_dataloader(self):
            for batch in super().train_dataloader():
                batch.rollout.advantages = torch.zeros(16)
                yield batch

    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=PerToken(num_rollouts=1))
    assert {row["advantage"] for row in read_rows(tmp_path / "trajectories")} == {None}


def test_only_every_nth_rollout_batch_is_written_when_asked(make_trainer, tmp_path):
    writer = TrajectoryWriter(folder=str(tmp_path / "kept"), every_n_batches=2)
    trainer = make_trainer(callbacks=[writer], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=3))
    names = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert names == ["step_000002.parquet", "step_000006.parquet"]


def test_a_file_that_can_t_be_written_is_told_once_and_the_run_goes_on(
    make_trainer, tmp_path, caplog
):
    class Mending(Callback):
        """Makes room before the last rollout batch."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                for thread in threading.enumerate():
                    if thread.name.startswith("trajectories"):  # that writes beside the steps
                        thread.join()
                (tmp_path / "kept").unlink()

    (tmp_path / "kept").touch()  # a file where the folder should be: like a full disk, an OSError
    callbacks = [TrajectoryWriter(folder=str(tmp_path / "kept")), Mending()]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=3))
    assert trainer.global_step == 6
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["step_000006.parquet"]
    told = [r.getMessage() for r in caplog.records if r.name.endswith("recording")]
    assert len(told) == 2
    assert "step_000002.parquet can't be written (" in told[0]
    assert "written again" in told[1]


def test_a_file_is_there_before_the_checkpoint_that_follows_it(make_trainer, tmp_path):
    class Slow(TrajectoryWriter):
        def _write(self, *args, **about) -> None:
            time.sleep(0.3)
            super()._write(*args, **about)

    class Saving(Callback):
        def __init__(self) -> None:
            self.found = []

        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")
                self.found = [file.name for file in (tmp_path / "kept").glob("*.parquet")]

    saving = Saving()
    callbacks = [Slow(folder=str(tmp_path / "kept")), saving]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert saving.found == ["step_000002.parquet"]


def test_what_no_disk_is_to_blame_for_ends_the_run(make_trainer, tmp_path):
    class Wrong(TrajectoryWriter):
        def _write(self, *args, **about) -> None:
            raise TypeError("a column can't hold that")

    callbacks = [Wrong(folder=str(tmp_path / "kept"))]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=False)
    with pytest.raises(TypeError, match="can't hold that"):
        trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=3))


def test_an_interval_of_zero_is_refused():
    with pytest.raises(ConfigError, match="`every_n_batches` must be >= 1, got 0"):
        TrajectoryWriter(every_n_batches=0)


def test_held_out_answers_are_kept_beside_and_not_replayed(make_trainer, tmp_path):
    answered = {"easy": [make_group(1)], "hard": [make_group(2, version=3)]}
    data = TinyData(evaluations=[TinyEvaluation(30, {}, answered)])
    trainer = make_trainer(
        callbacks=[TrajectoryWriter(str(tmp_path / "kept"))], limit_val_batches=1
    )
    trainer.validate(TinyModule(), datamodule=data)
    rows = read_rows(tmp_path / "kept" / "held_out")
    assert [(row["step"], row["row"], row["outcome"]) for row in rows[::2]] == [
        (30, 1, "held out"),
        (30, 2, "held out"),
    ]
    with pytest.raises(CheckpointError, match="No trajectories"):
        read_rows(tmp_path / "kept")
