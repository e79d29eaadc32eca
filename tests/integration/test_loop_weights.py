"""What is validated, saved and served are the weights that are trained; schedules that wait."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_grpo.errors import ConfigError
from lightning_grpo.module import GRPOModule
from tests.fakes.loops import make_data, make_module, make_prompts, make_trainer

SAVED = {"enable_checkpointing": True, "val_check_interval": 1}


class Average(Callback):
    """A moving average as users write it: swapped in for a validation, and put back."""

    average: dict[str, torch.Tensor] | None = None

    def on_train_batch_end(self, trainer, pl_module, *_: object) -> None:
        self.average = {n: 0.5 * p.detach() for n, p in pl_module.named_parameters()}

    def swap(self, pl_module) -> None:
        if self.average is not None:
            for name, parameter in pl_module.named_parameters():
                held = parameter.detach().clone()
                parameter.data.copy_(self.average[name])
                self.average[name] = held


class AtEpochs(Average):
    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self.swap(pl_module)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.swap(pl_module)


class AtStarts(Average):
    def on_validation_start(self, trainer, pl_module) -> None:
        self.swap(pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.swap(pl_module)


class InCheckpoints(Average):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["state_dict"] = self.average


class Beside(Average):
    """An average that is kept for itself is nobody's business."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["average"] = self.average


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AtEpochs, "weights must stay as they were published until the next step.* AtEpochs has"),
        (AtStarts, "weights must stay as they were published until the next step.* AtStarts has"),
        (InCheckpoints, "a checkpoint must hold the weights that are trained.* InCheckpoints puts"),
        (Beside, ""),
    ],
)
def test_weights_that_a_callback_swaps_are_refused_unless_they_stay_beside(
    kind, message, tiny_model, server, tmp_path
):
    saves = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2)
    trainer = make_trainer(tmp_path, callbacks=[kind(), saves], **SAVED)
    data = make_data(server, val_prompts=make_prompts(2))
    if not message:
        trainer.fit(make_module(tiny_model), data)
        (path,) = (tmp_path / "saved").iterdir()
        assert "average" in torch.load(path, weights_only=True)
        return
    with pytest.raises(ConfigError, match=message):
        trainer.fit(make_module(tiny_model), data)


class AtTests(Average):
    def on_test_epoch_start(self, trainer, pl_module) -> None:
        self.swap(pl_module)


def test_weights_that_are_swapped_for_a_test_are_refused_after_a_run_without_validations(
    tiny_model, server, tmp_path
):
    trainer = make_trainer(tmp_path, callbacks=[AtTests()], max_steps=2, limit_val_batches=0)
    module, data = make_module(tiny_model), make_data(server, val_prompts=make_prompts(2))
    trainer.fit(module, data)
    with pytest.raises(
        ConfigError, match=r"weights must stay as they were published.* AtTests has"
    ):
        trainer.test(module, data)


def test_a_module_that_swaps_its_weights_is_refused_too(tiny_model, server, tmp_path):
    class Mine(GRPOModule):
        def on_validation_epoch_start(self) -> None:
            super().on_validation_epoch_start()
            for parameter in self.parameters():
                parameter.data.mul_(0.9)

    data = make_data(server, val_prompts=make_prompts(2))
    with pytest.raises(ConfigError, match="Mine has changed them"):
        make_trainer(tmp_path).fit(make_module(tiny_model, Mine), data)


def test_a_module_that_saves_other_weights_is_refused_too(tiny_model, server, tmp_path):
    class Mine(GRPOModule):
        def on_save_checkpoint(self, checkpoint) -> None:
            super().on_save_checkpoint(checkpoint)
            halves = {name: 0.5 * value for name, value in checkpoint["state_dict"].items()}
            checkpoint["state_dict"] = halves

    saves = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2)
    with pytest.raises(ConfigError, match="a checkpoint must hold the weights that are trained"):
        make_trainer(tmp_path, callbacks=[saves], **SAVED).fit(
            make_module(tiny_model, Mine), make_data(server, val_prompts=make_prompts(2))
        )


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, *_: object) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def worst(completion: str) -> float:
    """No answer is better than another, so that every plateau is one."""
    return 0.0


def plateau(monitor):
    return lambda optimizer: ReduceLROnPlateau(
        optimizer, monitor=monitor, mode="max", factor=0.5, patience=0
    )


@pytest.mark.parametrize(
    ("monitor", "rates"),
    [
        # Seen after steps 2 and 4, and not at each step in between; the baseline is the best.
        ("eval/avg_at_1", [0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]),
        ("reward/mean", [0.05, 0.05, 0.025, 0.0125, 0.00625, 0.003125]),
    ],
)
def test_a_schedule_waits_for_a_plateau_of_the_metric_that_it_names_and_resumes(
    monitor, rates, tiny_model, server, tmp_path
):
    def fit(steps, **kwargs):
        seen = Rates()
        saves = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1)
        trainer = make_trainer(
            tmp_path, max_steps=steps, val_check_interval=2, callbacks=[seen, saves],
            check_val_every_n_epoch=None, enable_checkpointing=True,
        )  # fmt: skip
        module = make_module(tiny_model, lr_scheduler=plateau(monitor))
        data = make_data(server, worst, val_prompts=make_prompts(2), prompts=make_prompts(24))
        trainer.fit(module, data, **kwargs)
        return seen.seen

    assert fit(6) == pytest.approx(rates)
    path = Path(tmp_path / "saved" / "step=4.ckpt")
    assert fit(6, ckpt_path=path) == pytest.approx(rates[4:])


@pytest.mark.parametrize(
    ("monitor", "held_out", "message"),
    [
        ("eval/avg_at_1", None, "no held-out prompts are answered"),
        ("eval/avg_at_7", make_prompts(2), "got 'eval/avg_at_7'. There are: .*eval/avg_at_1"),
        ("reward/maen", None, "got 'reward/maen'. There are: .*reward/mean"),
    ],
)
def test_a_metric_that_never_comes_is_refused(
    monitor, held_out, message, tiny_model, server, tmp_path
):
    module = make_module(tiny_model, lr_scheduler=plateau(monitor))
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path).fit(module, make_data(server, val_prompts=held_out))
