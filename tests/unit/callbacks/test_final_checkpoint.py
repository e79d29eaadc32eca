"""The end of training leaves a checkpoint of the last step."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_grpo.callbacks.recording import FinalCheckpoint


def fit(folder, *callbacks, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FinalCheckpoint(), *callbacks],
        **options,
    )
    trainer.fit(BoringModel())
    return sorted(path.name for path in folder.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore")
def test_steps_after_the_last_validation_are_saved(tmp_path):
    saved = fit(tmp_path, ModelCheckpoint(every_n_train_steps=3))
    assert "final-step=5.ckpt" in saved


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path):
    saved = fit(tmp_path, ModelCheckpoint(every_n_train_steps=5))
    assert not [name for name in saved if name.startswith("final")]


@pytest.mark.filterwarnings("ignore")
def test_what_another_run_has_saved_in_the_same_folder_stays(tmp_path):
    for _ in range(2):
        fit(tmp_path, ModelCheckpoint(every_n_train_steps=3))
    saved = fit(tmp_path, ModelCheckpoint(every_n_train_steps=3))
    finals = [name for name in saved if name.startswith("final")]
    assert finals == ["final-step=5-v1.ckpt", "final-step=5-v2.ckpt", "final-step=5.ckpt"]


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_without_checkpoints_stays_without(tmp_path):
    assert fit(tmp_path, enable_checkpointing=False) == []
