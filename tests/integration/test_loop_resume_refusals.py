"""Checkpoints that a run can't go on from, each refused in one sentence."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError
from tests.fakes.loops import NeverServers, make_data, make_module, make_prompts, make_trainer
from tests.fakes.ranks import run_ranks
from tests.fakes.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tiny_model, loop_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.fit(make_module(tiny_model), make_data(loop_engine.url))
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 4}, "`data.group_size` must be what the checkpoint's run had (finished"),
        ({"batch_size": 4}, "`data.batch_size` must be what the checkpoint's run had (versions"),
        ({"minibatches_per_batch": 2}, "`data.minibatches_per_batch` must be what"),
        ({"passes_per_batch": 2}, "`data.passes_per_batch` must be what"),
        ({"prompts": make_prompts(seed=1)}, "`data.prompts.seed` must be what"),
        ({"prompts": make_prompts(shuffle=False)}, "`data.prompts.shuffle` must be what"),
        ({"prompts": make_prompts(11)}, "would be another prompt), 12 prompts ("),
        ({"prompts": make_prompts(suffix="?")}, "got 12 prompts ("),
    ],
)
def test_settings_that_positions_depend_on_may_not_change(
    tiny_model, server, tmp_path, checkpoint, settings, message
):
    trainer = make_trainer(tmp_path, max_steps=4)
    with pytest.raises(ConfigError, match=re.escape(message)) as refusal:
        trainer.fit(make_module(tiny_model), make_data(server, **settings), ckpt_path=checkpoint)
    assert "Set it back, or begin a new run from these weights" in str(refusal.value)
    assert trainer.global_step == 0


def test_other_settings_may_change(tiny_model, server, tmp_path, checkpoint):
    trainer = make_trainer(tmp_path, max_steps=4, gradient_clip_val=1.0)
    data = make_data(server, max_staleness=2)
    trainer.fit(make_module(tiny_model), data, ckpt_path=checkpoint)
    assert trainer.global_step == 4
    held_out = make_data(server, val_prompts=make_prompts(2), group_size=4)
    make_trainer(tmp_path).validate(make_module(tiny_model), held_out, ckpt_path=checkpoint)
    assert held_out.evaluations[-1].step == 2


def test_a_checkpoint_of_another_model_is_refused(server, tmp_path, checkpoint):
    other = make_tiny_model(tmp_path / "other", num_layers=1, hidden_size=16)
    with pytest.raises(ConfigError, match=r"checkpoint of the same model as `model\.model`, and"):
        make_trainer(tmp_path).fit(make_module(other), make_data(server), ckpt_path=checkpoint)


class Renamed(RolloutDataModule):
    """Lightning keeps states under the names of classes."""


def test_a_checkpoint_of_another_class_of_data_module_is_refused(
    tiny_model, server, tmp_path, checkpoint
):
    data = make_data(server, cls=Renamed)
    with pytest.raises(ConfigError, match=r"would begin anew\), RolloutDataModule, got Renamed\."):
        make_trainer(tmp_path).fit(make_module(tiny_model), data, ckpt_path=checkpoint)
    held_out = make_data(server, cls=Renamed, val_prompts=make_prompts(2))
    make_trainer(tmp_path).validate(make_module(tiny_model), held_out, ckpt_path=checkpoint)
    assert held_out.evaluations[-1].step == 2


def test_a_folder_that_is_no_checkpoint_is_refused(tiny_model, server, tmp_path, checkpoint):
    with pytest.raises(ConfigError, match=r"is a folder without meta\.pt.*In it lies .*run\.ckpt"):
        make_trainer(tmp_path).fit(
            make_module(tiny_model), make_data(server), ckpt_path=checkpoint.parent
        )


def fit_on_too_few_sequences(model: str, folder: str) -> tuple[str, bool, list[str]]:
    servers = NeverServers()
    trainer = make_trainer(Path(folder), devices=3, strategy="ddp")
    with pytest.raises(ConfigError) as refusal:
        trainer.fit(make_module(model), make_data(servers, batch_size=1))
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("grpo-")]
    return str(refusal.value), servers.started, left


@pytest.mark.slow
def test_more_ranks_than_sequences_are_refused_before_a_server_starts(tiny_model, tmp_path):
    for said, started, left in run_ranks(
        fit_on_too_few_sequences, 3, str(tiny_model), str(tmp_path)
    ):
        assert "at most the sequences of a minibatch" in said
        assert said.endswith("got 3 ranks. Use fewer devices, or raise `data.batch_size`.")
        assert not started
        assert left == []
