"""Optimizers that evaluate the loss several times in a step: every time anew, on any strategy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.algorithm.corrections import TokenTIS
from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.errors import ConfigError
from lightning_grpo.module import GRPOModule
from tests.fakes.loops import Recorder, make_trainer
from tests.fakes.optimizers import SAM, Repeating
from tests.fakes.ranks import run_ranks
from tests.fakes.recordings import write_recording
from tests.fakes.tiny_lm import VOCAB, make_lm

STEPS_PER_BATCH = 2
DATA = {"minibatches_per_batch": STEPS_PER_BATCH, "batch_size": 4}


@pytest.fixture
def folder(tmp_path) -> str:
    disable_progress_bar()  # its monitor thread would outlive the test
    make_lm(seed=5).save_pretrained(tmp_path / "model")
    write_recording(tmp_path / "recording", 1, batches=3, groups=4, vocab=VOCAB)
    return str(tmp_path)


class AnchorPasses(Callback):
    """Counts passes without gradient: those that fix where the clip is anchored."""

    count = 0

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.policy.register_forward_pre_hook(self._pass)

    def _pass(self, *_: object) -> None:
        self.count += not torch.is_grad_enabled()


def fit(folder: str, optimizer: Any, strategy: str = "auto", ranks: int = 1, **kwargs: Any):
    recorder = Recorder()
    ckpt_path, saved = kwargs.pop("ckpt_path", None), kwargs.pop("saved", None)
    settings = {"max_steps": 4, "callbacks": [recorder, *kwargs.pop("callbacks", [])]}
    trainer = make_trainer(
        Path(folder) / "run", devices=ranks, strategy=strategy, **{**settings, **kwargs}
    )
    module = GRPOModule(f"{folder}/model", optimizer=optimizer, correction=TokenTIS())
    data = ReplayDataModule(f"{folder}/recording", **DATA)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    if saved is not None:
        trainer.save_checkpoint(saved)
    return trainer, recorder.metrics


def curve(metrics: list[dict[str, float]], name: str = "policy/loss") -> list[float]:
    """NaN where a step measured none: one whose groups all had equal rewards."""
    return [float(step.get(name, math.nan)) for step in metrics]


def test_gradients_do_not_add_up_and_what_belongs_to_the_step_is_taken_once(folder):
    once, twice = AnchorPasses(), AnchorPasses()
    _, plain = fit(folder, lambda p: torch.optim.SGD(p, lr=0.1), callbacks=[once])
    trainer, repeated = fit(folder, Repeating, callbacks=[twice])
    norms = trainer.optimizers[0].seen
    assert len(norms) == 4
    assert [again for _, _, again in norms] == pytest.approx([first for first, _, _ in norms])
    assert any(moved != pytest.approx(first, rel=1e-2) for first, moved, _ in norms)
    # The second evaluation changes neither the clip's anchor nor the curves.
    assert once.count == twice.count > 0
    for name in ("policy/loss", "ratio/mean", "policy/entropy"):
        assert curve(repeated, name) == pytest.approx(curve(plain, name), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    "optimizer", [SAM, lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3)], ids=["sam", "lbfgs"]
)
def test_they_learn_and_resume(optimizer, folder):
    checkpoint = f"{folder}/after-4.ckpt"
    fit(folder, optimizer, saved=checkpoint)
    _, whole = fit(folder, optimizer, max_steps=6)
    _, rest = fit(folder, optimizer, max_steps=6, ckpt_path=checkpoint)
    assert curve(rest) == pytest.approx(curve(whole)[4:], abs=1e-6)


def on_ranks(folder: str, ranks: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for strategy in ("ddp", "fsdp2") if ranks > 1 else ("auto", "fsdp2"):
        checkpoint = f"{folder}/{strategy}.ckpt"
        _, begun = fit(folder, SAM, strategy, ranks, saved=checkpoint)
        _, rest = fit(folder, SAM, strategy, ranks, max_steps=6, ckpt_path=checkpoint)
        found[strategy] = curve(begun) + curve(rest)
    if ranks > 1:
        with pytest.raises(ConfigError, match=r"must work on sharded parameters.*LBFGS doesn't"):
            fit(folder, torch.optim.LBFGS, "fsdp2", ranks)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_take_the_steps_of_one_under_every_strategy(folder):
    (alone,) = run_ranks(on_ranks, 1, folder, 1, timeout_s=120)
    for found in run_ranks(on_ranks, 2, folder, 2, timeout_s=120):
        for losses in found.values():
            assert losses == pytest.approx(alone["auto"], abs=1e-5)
    assert alone["fsdp2"] == pytest.approx(alone["auto"], abs=1e-6)
