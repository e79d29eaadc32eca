"""Rollouts in a process of their own: the run is the one of a thread, and ends as it does."""

from __future__ import annotations

import random
import threading

import numpy as np
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
from lightning_grpo.session.assembly import from_checkpoint
from lightning_grpo.types import Sampling
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.transport import DiskTransport
from tests.fakes.forked_servers import ForkedServers
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
    data = make_data(ForkedServers(), rollouts_in=where, **{**held_out, **settings})
    module, recorder = make_module(tiny_model, optimizer=make_adam), Recorder()
    trainer = make_trainer(folder, max_steps=max_steps, val_check_interval=2, callbacks=[recorder])
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
    rollouts, others = (from_checkpoint(each["RolloutDataModule"]) for each in (left, other))
    for name in ("gate", "ledger", "num_filtered"):
        assert rollouts["producer"][name] == others["producer"][name]
    assert rollouts["version"] == others["version"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("order", [("thread", "process"), ("process", "thread")])
def test_a_run_goes_on_where_it_stopped_in_the_other_place(tiny_model, tmp_path, strictly, order):
    straight, _, end = fit(tiny_model, tmp_path / "straight", order[0], max_staleness=0)
    before, _, _ = fit(tiny_model, tmp_path / "a", order[0], max_steps=2, max_staleness=0)
    path = tmp_path / "a" / "end.ckpt"
    after, _, left = fit(tiny_model, tmp_path / "b", order[1], path, max_staleness=0)
    assert groups_of(straight) == groups_of(before) + groups_of(after)
    for name, weight in end["state_dict"].items():
        assert torch.equal(weight, left["state_dict"][name])


@pytest.mark.parametrize(
    "kind", [pytest.param(DiskTransport, marks=pytest.mark.slow), ProcessGroupTransport]
)
def test_the_transport_that_was_given_sends_the_weights_from_the_trainer_s_memory(
    tiny_model, server, tmp_path, kind
):
    transport = kind()
    recorder = Recorder()
    callbacks = [recorder, WeightSync(transport)]
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=callbacks)
    trainer.fit(make_module(tiny_model), make_data(server, rollouts_in="process"))
    assert {b.rollout.version for b in recorder.batches} == {0, 1, 2}
    assert vars(transport).get("_current") or vars(transport).get("_buckets")
    assert trainer.datamodule.session.report.probe_diff < 1e-3


def test_events_and_warnings_come_to_the_trainer(tiny_model, server, tmp_path, caplog):
    def reward(completion: str, answer: str) -> float:
        if answer in ("4", "16") and completion:
            raise ValueError("an odd one")
        return 1.0

    limits = RolloutLimits(reward_processes=0, max_attempts=1, max_failed_fraction=1.0)
    data = make_data(server, reward, rollouts_in="process", limits=limits, batch_size=5)
    data.on_event = events = Events()
    make_trainer(tmp_path, max_steps=2).fit(make_module(tiny_model), data)
    assert [seen["version"] for seen in events.of("take")] == [0, 1]
    assert events.of("failed")
    assert "prompt failed 1 times" in caplog.text
    assert "ValueError: an odd one" in caplog.text


def test_a_reward_that_raises_for_all_answers_ends_the_run_with_its_line(
    tiny_model, server, tmp_path
):
    def reward(completion: str) -> float:
        if not completion:
            return 0.0  # so that its trial at the start finds nothing
        raise ZeroDivisionError("the dataset is empty")

    data = make_data(server, reward, rollouts_in="process")
    with pytest.raises(FailureBudgetError) as ended:
        make_trainer(tmp_path).fit(make_module(tiny_model), data)
    assert 'raise ZeroDivisionError("the dataset is empty")' in str(ended.value)
    assert ended.value.__cause__ is not None


def test_a_reward_that_cannot_work_is_refused_before_anything_is_started(
    tiny_model, server, tmp_path
):
    def reward(completion: str) -> float:
        return completion.no_such_attribute

    data = make_data(server, reward, rollouts_in="process")
    with pytest.raises(ConfigError, match="no_such_attribute"):
        make_trainer(tmp_path).fit(make_module(tiny_model), data)


def rollouts_process():
    """The one that this process has started."""
    (found,) = [p for p in psutil.Process().children() if "session.child" in str(p.cmdline())]
    return found


def its_engine():
    """The server that it has started, under a supervisor."""
    (supervisor,) = [p for p in rollouts_process().children() if "supervisor" in str(p.cmdline())]
    (engine,) = supervisor.children()
    return engine


class Kill(Callback):
    """Kills a process of the run after its first step."""

    def __init__(self, find) -> None:
        self.find = find

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            self.find().kill()


def test_a_process_that_is_killed_ends_the_run_and_its_servers(tiny_model, tmp_path):
    data = make_data(ForkedServers(), rollouts_in="process", max_staleness=1)
    trainer = make_trainer(tmp_path, max_steps=50, callbacks=[Kill(rollouts_process)])
    with pytest.raises(RolloutError, match=r"the rollouts' process \(pid \d+\) ended, by signal 9"):
        trainer.fit(make_module(tiny_model), data)
    assert not list(tmp_path.rglob("*.ckpt"))  # where the rollouts stood is gone with it
    with pytest.raises(RolloutError, match="ended before it told its state"):
        trainer.save_checkpoint(tmp_path / "after.ckpt")  # it would begin the prompts anew


@pytest.mark.slow
def test_a_server_that_is_killed_is_started_again(tiny_model, tmp_path):
    data = make_data(EmbeddedServers(), rollouts_in="process")
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[Kill(its_engine)])
    trainer.fit(make_module(tiny_model), data)
    assert trainer.global_step == 4


class Choosy(RolloutDataModule):
    """Hooks that are called where the rollouts are."""

    def make_prompt(self, row, tokenizer):
        return super().make_prompt({**row, "question": row["question"].upper()}, tokenizer)

    def keep_group(self, group):
        return len({t.reward for t in group.trajectories}) > 1 or group.prompt.row > 3


def test_hooks_of_a_subclass_are_called_there(tiny_model, server, tmp_path):
    recorder = Recorder()
    data = make_data(server, cls=Choosy, rollouts_in="process", prompts=make_prompts(20))
    make_trainer(tmp_path, callbacks=[recorder]).fit(make_module(tiny_model), data)
    assert all("WHAT IS" in g.prompt.text for g in groups_of(recorder))
    assert all(data.keep_group(g) for g in groups_of(recorder))


class Random(RolloutDataModule):
    """A hook that draws from the generators that `seed_everything` seeds."""

    def make_prompt(self, row, tokenizer):
        drawn = f"{random.random()} {np.random.rand()} {torch.rand(1).item()}"
        return super().make_prompt({**row, "question": drawn}, tokenizer)


@pytest.mark.slow
def test_hooks_draw_the_same_numbers_again_after_seed_everything(
    tiny_model, server, tmp_path, monkeypatch
):
    """Nor need the prompts be those that the trainer's process would draw, for the proof."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    texts = []
    for run in ("a", "b"):
        recorder = Recorder()
        data = make_data(server, cls=Random, rollouts_in="process")
        trainer = make_trainer(tmp_path / run, max_steps=1, callbacks=[recorder])
        trainer.fit(make_module(tiny_model), data)
        texts.append([g.prompt.text for g in groups_of(recorder)])
    assert texts[0] == texts[1]


class Unportable(RLVRWorkflow):
    """Holds what no other process can have."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lock = threading.Lock()


def test_what_cannot_be_passed_on_keeps_the_rollouts_in_the_thread_and_it_is_said(
    tiny_model, server, tmp_path, caplog
):
    workflow = Unportable(odd_reward, Sampling(max_new_tokens=6))
    data = make_data(server, workflow=workflow, rollouts_in="process")
    trainer = make_trainer(tmp_path)
    trainer.fit(make_module(tiny_model), data)
    assert trainer.global_step == 2
    said = [r.getMessage() for r in caplog.records if "stay in a thread" in r.getMessage()]
    assert len(said) == 1
    assert "lock" in said[0]


def test_a_place_that_there_is_not_is_refused(server):
    with pytest.raises(ConfigError, match="`rollouts_in` must be one of auto, thread, process"):
        make_data(server, rollouts_in="elsewhere")
