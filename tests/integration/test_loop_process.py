"""Rollouts in a process of their own: the run is the one of a thread, and ends as it does."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError, FailureBudgetError, RolloutError
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.types import Sampling
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.transport import DiskTransport
from tests.fakes.loops import (
    Events,
    Recorder,
    make_data,
    make_module,
    make_prompts,
    make_trainer,
    odd_reward,
)
from tests.fakes.user_objects import make_adam


@pytest.fixture
def strictly():
    """Groups in the order of admission, the same bits for the same requests."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def groups_of(recorder):
    return [g for b in recorder.batches for g in b.rollout.groups]


def fit(tiny_model, folder, where, ckpt_path=None, max_steps=4, **settings):
    """A deterministic run with a server of its own, and what it left behind."""
    held_out = {"val_prompts": make_prompts(3), "max_staleness": 1, "group_size": 3}
    data = make_data(EmbeddedServers(), rollouts_in=where, **{**held_out, **settings})
    module, recorder = make_module(tiny_model, optimizer=make_adam), Recorder()
    trainer = make_trainer(
        folder, max_steps=max_steps, val_check_interval=2, callbacks=[recorder]
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    path = folder / "end.ckpt"
    trainer.save_checkpoint(path)
    return recorder, data, torch.load(path, weights_only=True)


def test_a_process_makes_the_same_trajectories_weights_answers_and_checkpoints_as_a_thread(
    tiny_model, tmp_path, strictly
):
    (ours, in_thread, left), (theirs, in_process, other) = (
        fit(tiny_model, tmp_path / where, where) for where in ("thread", "process")
    )
    assert groups_of(ours) == groups_of(theirs)
    assert len(groups_of(ours)) == 8
    for name, weight in left["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name])
    assert [e.metrics for e in in_thread.evaluations] == [e.metrics for e in in_process.evaluations]
    assert [e.groups for e in in_thread.evaluations] == [e.groups for e in in_process.evaluations]
    rollouts, others = left["RolloutDataModule"], other["RolloutDataModule"]
    for name in ("gate", "ledger", "num_filtered"):
        assert rollouts["producer"][name] == others["producer"][name]
    assert rollouts["version"] == others["version"] == 4
