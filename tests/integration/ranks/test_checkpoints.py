"""Checkpoints of the real module on real ranks: kept, resumed on any number of ranks, whole."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.cli.folders import build_module, read_checkpoint
from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.module import GRPOModule
from lightning_grpo.strategies.checkpoints import AtomicCheckpointIO
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from tests.fakes.loops import Recorder, make_trainer
from tests.fakes.ranks import run_ranks
from tests.fakes.recordings import write_recording
from tests.fakes.tiny_lm import VOCAB, make_lm
from tests.fakes.tiny_model import make_tiny_model

BATCHES = 4


class Scored(GRPOModule):
    """A held-out score that is best at step 2."""

    def on_before_optimizer_step(self, optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.log("eval/avg_at_1", 1.0 - abs(self.trainer.global_step + 1 - 2.0) / 10)


class FullDisk(Callback):
    """From step 3 on no file of rank 1 grows beyond a few kB."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))


def fit(
    folder: str, ranks: int, name: str, strategy: Any, ckpt_path: Any = None, **kwargs: Any
) -> list[dict[str, float]]:
    recorder = Recorder()
    kept = ModelCheckpoint(
        Path(folder) / name,
        "{step}",
        monitor="eval/avg_at_1",
        mode="max",
        save_top_k=1,
        save_last="link",
        every_n_train_steps=1,
    )
    newest = ModelCheckpoint(
        Path(folder) / name,
        "newest-{step}",
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=1,
    )
    callbacks = [recorder, *kwargs.pop("callbacks", []), kept, newest]
    trainer = make_trainer(
        Path(folder) / "run",
        devices=ranks,
        strategy=strategy,
        max_steps=100,
        callbacks=callbacks,
        enable_checkpointing=True,
        **kwargs,
    )
    module = Scored(f"{folder}/model", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer.fit(module, ReplayDataModule(f"{folder}/recording"), ckpt_path=ckpt_path)
    return [{k: m[k] for k in ("policy/loss", "policy/grad_norm")} for m in recorder.metrics]


def save(folder: str, ranks: int) -> list[dict[str, float]]:
    fit(folder, ranks, "full", FSDP2Strategy(save_distributed_checkpoint=False))
    return fit(folder, ranks, "sharded", "fsdp2")


def resume(folder: str, ranks: int) -> list[list[dict[str, float]]]:
    plain = "ddp" if ranks > 1 else "auto"
    ways = (("sharded", "fsdp2"), ("full", "fsdp2"), ("full", plain))
    return [
        fit(folder, ranks, f"again-{ranks}-{k}", strategy, f"{folder}/{saved}/step=2.ckpt")
        for k, (saved, strategy) in enumerate(ways)
    ]


def fill_disk(folder: str, ranks: int) -> list[str]:
    said = []
    for way in ("continue", "stop"):
        try:
            fit(
                folder,
                ranks,
                way,
                "fsdp2",
                callbacks=[FullDisk()],
                plugins=[AtomicCheckpointIO(way)],
            )
        except CheckpointError as error:
            said.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    return said


@pytest.fixture
def folder(tmp_path) -> str:
    disable_progress_bar()  # its monitor thread would outlive the test
    make_lm(seed=5).save_pretrained(tmp_path / "model")
    write_recording(tmp_path / "recording", 1, batches=BATCHES, groups=4, vocab=VOCAB)
    return str(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_best_and_the_newest_are_kept_and_resume_on_another_number_of_ranks(folder):
    whole, _ = run_ranks(save, 2, folder, 2, timeout_s=120)
    assert len(whole) == BATCHES
    for kind in ("full", "sharded"):
        names = {path.name for path in (Path(folder) / kind).iterdir()}
        assert names == {"step=2.ckpt", "newest-step=3.ckpt", "newest-step=4.ckpt", "last.ckpt"}
        assert (Path(folder) / kind / "last.ckpt").is_symlink()
    path = Path(folder) / "sharded" / "step=2.ckpt"
    state = read_checkpoint(path)
    assert state["global_step"] == 2
    loaded = build_module(state, path, trust_remote_code=False).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state["state_dict"].items())
    for ranks in (1, 3):
        for rank in run_ranks(resume, ranks, folder, ranks, timeout_s=120):
            for losses in rank:
                assert len(losses) == BATCHES - 2
                for found, expected in zip(losses, whole[2:], strict=True):
                    assert found == pytest.approx(expected, abs=1e-5)


def resume_another_model(folder: str) -> list[str]:
    fit(folder, 1, "sharded", "fsdp2")
    make_tiny_model(Path(folder) / "model", num_layers=1, hidden_size=16)
    said = []
    for strategy in ("fsdp2", "auto"):
        with pytest.raises(ConfigError) as refusal:
            fit(folder, 1, "again", strategy, f"{folder}/sharded/step=2.ckpt")
        said.append(str(refusal.value))
    return said


@pytest.mark.slow
def test_shards_of_another_model_are_refused_and_shards_where_none_are_read(folder):
    ((another, shards),) = run_ranks(resume_another_model, 1, folder, timeout_s=100)
    assert "must be a checkpoint of the same model as `model.model`" in another
    assert "which only FSDP2Strategy reads" in shards


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_disk_that_fills_on_one_rank_is_told_on_all_and_older_checkpoints_are_whole(folder):
    for said in run_ranks(fill_disk, 2, folder, 2, timeout_s=120):
        assert len(said) == 1
        assert "can't be written" in said[0]
    for way in ("continue", "stop"):
        names = {path.name for path in (Path(folder) / way).iterdir() if not path.is_symlink()}
        assert names == {"step=2.ckpt", "newest-step=1.ckpt", "newest-step=2.ckpt"}
        assert read_checkpoint(Path(folder) / way / "step=2.ckpt")["global_step"] == 2
