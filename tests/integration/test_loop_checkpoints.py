"""Checkpoints: what they hold, what loads them, and a curve that goes on where it stopped."""

from __future__ import annotations

import csv
import os
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_grpo.algorithm.losses import GRPOLoss
from lightning_grpo.callbacks.signals import SignalHandling
from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.errors import CheckpointError, StopRun
from lightning_grpo.module import GRPOModule
from lightning_grpo.rollout.admission import Curriculum, undecided
from lightning_grpo.rollout.records import recorded_version, trajectory_files
from lightning_grpo.strategies.checkpoints import AtomicCheckpointIO
from lightning_grpo.types import Sampling
from tests.fakes.forked_servers import ForkedServers
from tests.fakes.loops import Recorder, make_data, make_module, make_prompts, make_trainer
from tests.fakes.user_objects import MaxRL, ScaledLoss, make_adam


def fit_and_save(tmp_path, module, server, data=None, **settings):
    trainer = make_trainer(tmp_path, **settings)
    trainer.fit(module, data or make_data(server))
    trainer.save_checkpoint(tmp_path / "run.ckpt")  # after the end, as people do
    return tmp_path / "run.ckpt"


def test_a_checkpoint_is_plain_data_and_makes_the_module_again(tiny_model, server, tmp_path):
    module = make_module(
        tiny_model,
        loss=GRPOLoss(clip_high=0.3),
        optimizer=make_adam,
        max_tokens_per_microbatch=999,
    )
    path = fit_and_save(tmp_path, module, server)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["loss"]["init_args"]["clip_high"] == 0.3
    assert checkpoint["hyper_parameters"]["not_restored"] == []
    assert checkpoint["RolloutDataModule"]["version"] == 2
    loaded = GRPOModule.load_from_checkpoint(path)
    assert loaded.loss == GRPOLoss(clip_high=0.3)
    assert loaded.max_tokens_per_microbatch == 999
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_user_s_loss_object_and_subclass_come_back(tiny_model, server, tmp_path):
    path = fit_and_save(tmp_path, make_module(tiny_model, MaxRL, loss=ScaledLoss(0.5)), server)
    loaded = MaxRL.load_from_checkpoint(path)
    assert isinstance(loaded.loss, ScaledLoss)
    assert loaded.loss.scale == 0.5


def test_a_run_that_goes_on_remembers_its_baseline(tiny_model, server, tmp_path, capsys):
    def data():
        return make_data(server, val_prompts=make_prompts(4))

    every = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    path = fit_and_save(tmp_path, make_module(tiny_model), server, data(), **every)
    capsys.readouterr()
    resumed = data()
    trainer = make_trainer(tmp_path, max_steps=4, enable_progress_bar=True, **every)
    trainer.fit(make_module(tiny_model), resumed, ckpt_path=path)
    assert [record.step for record in resumed.evaluations] == [0, 2, 4]
    assert resumed.evaluations[0].metrics.keys() == resumed.evaluations[2].metrics.keys()
    assert "avg_at_1, step 0 -> 4" in capsys.readouterr().out
    other = data()
    logger = CSVLogger(tmp_path, name="later")
    trainer = make_trainer(tmp_path, logger=logger)
    trainer.validate(make_module(tiny_model), other, ckpt_path=path)
    assert [record.step for record in other.evaluations] == [2]
    with (tmp_path / "later/version_0/metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2"]


def test_lightning_s_own_csv_logger_goes_on_with_the_curve_that_it_would_delete(
    tiny_model, server, tmp_path
):
    def trainer(**settings):
        return make_trainer(tmp_path, logger=CSVLogger(tmp_path, "", version="kept"), **settings)

    def steps(name="metrics.csv"):
        with (tmp_path / "kept" / name).open() as file:
            return [row["step"] for row in csv.DictReader(file)]

    def data():
        return make_data(server, val_prompts=make_prompts(2))

    first = trainer(max_steps=2)
    first.fit(make_module(tiny_model), data())
    first.save_checkpoint(tmp_path / "run.ckpt")
    trainer(max_steps=3).fit(make_module(tiny_model), data(), ckpt_path=tmp_path / "run.ckpt")
    assert steps() == ["0", "1", "2", "3"]
    trainer().validate(make_module(tiny_model), data(), ckpt_path=tmp_path / "run.ckpt")
    assert (steps(), steps("metrics-validate.csv")) == (["0", "1", "2", "3"], ["2"])


def test_a_lambda_must_be_passed_again_to_train_on_and_the_error_says_so(
    tiny_model, server, tmp_path
):
    def build():
        return make_module(tiny_model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))

    path = fit_and_save(tmp_path, build(), server)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["not_restored"] == ["optimizer"]
    # To look at it, export it or go on with the optimizer passed again nothing is missing.
    loaded = GRPOModule.load_from_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"`optimizer`.*GRPOModule\(optimizer=\.\.\.\)"):
        make_trainer(tmp_path, max_steps=4).fit(loaded, make_data(server), ckpt_path=path)
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.fit(build(), make_data(server), ckpt_path=path)
    assert trainer.global_step == 4


def test_the_exported_folder_of_a_loaded_checkpoint_is_the_policy(tiny_model, server, tmp_path):
    from transformers import AutoModelForCausalLM

    module = make_module(tiny_model)
    path = fit_and_save(tmp_path, module, server)
    folder = GRPOModule.load_from_checkpoint(path).export(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = module.policy.model.state_dict()
    assert all(torch.equal(exported[name], ours[name]) for name in ours)


class SaveBefore(Callback):
    """Saves in the middle of the callbacks of a step, before WeightSync's turn."""

    def __init__(self, path, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_checkpoint_from_before_the_sync_trains_on_no_batch_twice(
    tiny_model, server, tmp_path, max_staleness
):
    def fit(steps, callbacks, ckpt_path=None):
        recorder = Recorder()
        data = make_data(server, prompts=make_prompts(40), max_staleness=max_staleness)
        # User's callbacks come first, unless the user has a WeightSync of their own in front.
        trainer = make_trainer(tmp_path, max_steps=steps, callbacks=[*callbacks, recorder])
        trainer.fit(make_module(tiny_model), data, ckpt_path=ckpt_path)
        keys = [g.prompt.key for b in recorder.batches for g in b.rollout.groups]
        return keys, recorder

    for first in ([], [WeightSync()]):
        path = tmp_path / f"{len(first)}.ckpt"
        before, _ = fit(5, [*first, SaveBefore(path, 3)])
        after, recorder = fit(5, [], path)
        assert [b.rollout.version for b in recorder.batches] == [3, 4]
        assert [b.rollout.index for b in recorder.batches] == [3, 4]
        assert not set(after) & set(before[:6])
        if max_staleness == 0:
            assert after == before[6:]
        recorded = torch.load(path, weights_only=True)["RolloutDataModule"]
        assert recorded["version"] == recorded["producer"]["gate"]["version"] == 3
        assert recorded["producer"]["ledger"]["counts"]["trained"] == 6


@pytest.fixture
def deterministic_off():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("minibatches", [2])
@pytest.mark.usefixtures("deterministic_off")
def test_in_deterministic_mode_a_resumed_run_is_the_run_bit_for_bit(
    tiny_model, tmp_path, minibatches
):
    steps = 3 * minibatches

    def fit(until, ckpt_path=None):
        recorder, module = Recorder(), make_module(tiny_model, optimizer=make_adam)
        data = make_data(
            ForkedServers(),
            batch_size=4,
            group_size=3,
            minibatches_per_batch=minibatches,
            sampling=Sampling(max_new_tokens=12),
            prompts={"few": make_prompts(4, weight=2.0), "many": make_prompts(12)},
            curriculum=Curriculum(undecided, least=0.3),
        )
        trainer = make_trainer(tmp_path, max_steps=until, deterministic=True, callbacks=[recorder])
        trainer.fit(module, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{until}.ckpt")
        trajectories = [
            (t.input_ids, t.logprobs, t.reward)
            for b in recorder.batches
            for g in b.rollout.groups
            for t in g.trajectories
        ]
        state = data.session.state_dict()["producer"]
        return trajectories, module.state_dict(), state["counters"]["skipped"]

    whole, expected, skipped = fit(2 * steps)
    first, *_ = fit(steps)
    second, weights, again = fit(2 * steps, tmp_path / f"{steps}.ckpt")
    assert first + second == whole
    assert again == skipped > 0
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_signals_are_wired_to_the_boundary_of_rollout_batches(tiny_model, server, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(make_module(tiny_model), make_data(server, minibatches_per_batch=2))
    (handling,) = [c for c in trainer.callbacks if isinstance(c, SignalHandling)]
    assert handling.requested is None
    assert not handling.flag.installed


class SignalAt(Callback):
    """SIGTERM to this process in the middle of a step."""

    def __init__(self, step: int = 2) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def curve(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["reward/mean"]]


def test_the_step_behind_which_a_signal_stops_is_in_the_curve_and_on_disk(
    tiny_model, server, tmp_path
):
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    trainer = make_trainer(tmp_path, max_steps=9, callbacks=[SignalAt()], logger=logger)
    with pytest.raises(StopRun, match="SIGTERM: stopped at step 3"):
        trainer.fit(make_module(tiny_model), make_data(server))
    assert [row["step"] for row in curve(tmp_path)] == list("123")
    assert [recorded_version(file) for file in trajectory_files(tmp_path)] == [0, 1, 2]


class BrokenOff(WeightSync):
    """A weight sync that a signal breaks off."""

    def _publish(self, trainer, pl_module, *, trained):
        if trained and trainer.global_step == 3:
            raise StopRun
        return super()._publish(trainer, pl_module, trained=trained)


def test_the_step_whose_weight_sync_is_broken_off_is_in_the_curve_without_its_time(
    tiny_model, server, tmp_path
):
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    trainer = make_trainer(tmp_path, max_steps=9, callbacks=[BrokenOff()], logger=logger)
    with pytest.raises(StopRun, match="SIGTERM: stopped at step 3"):
        trainer.fit(make_module(tiny_model), make_data(server))
    rows = curve(tmp_path)
    assert [row["step"] for row in rows] == list("123")
    assert [bool(row["time/weight_sync_s"]) for row in rows] == [True, True, False]


@pytest.mark.filterwarnings("ignore:.*no last checkpoint")  # the first start has none yet
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_runs_that_are_stopped_and_go_on_from_last_keep_as_many_checkpoints(
    tiny_model, server, tmp_path, strategy, ends_its_group
):
    keeps = {"monitor": "step", "mode": "max", "save_top_k": 1, "every_n_train_steps": 2}
    for steps in (3, 6, 9):
        saves = ModelCheckpoint(tmp_path / "kept", "{step}", save_last=True, **keeps)
        trainer = make_trainer(
            tmp_path, max_steps=99, strategy=strategy, enable_checkpointing=True,
            callbacks=[saves, SignalAt(steps - 1)],
        )  # fmt: skip
        with pytest.raises(StopRun, match=f"stopped at step {steps}"):
            trainer.fit(make_module(tiny_model), make_data(server), ckpt_path="last")
        kept = {path.name for path in tmp_path.rglob("*.ckpt") if not path.is_symlink()}
        assert kept == {"hpc_ckpt_1.ckpt", f"step={(steps - 1) // 2 * 2}.ckpt"}


class OwnSetup(GRPOModule):
    """Lightning's own hook, for which no `super()` is needed."""

    def setup(self, stage) -> None:
        self.stage = stage


def test_a_module_with_a_setup_of_its_own_stops_between_rollout_batches_too(
    tiny_model, server, tmp_path
):
    trainer = make_trainer(tmp_path, max_steps=10, callbacks=[SignalAt()])
    with pytest.raises(StopRun, match="SIGTERM: stopped at step 4"):
        trainer.fit(make_module(tiny_model, OwnSetup), make_data(server, minibatches_per_batch=2))


class FullDisk(AtomicCheckpointIO):
    """Takes no checkpoint."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        self.failed(path, "No space left on device")


def test_a_stop_that_can_t_save_ends_all_that_the_run_has_started(tiny_model, server, tmp_path):
    answered = []

    def reward(completion: str) -> float:
        answered.append(completion)
        # One call tries it before the start; the next of the third batch is waited for.
        if len(answered) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(answered) >= 10:
            time.sleep(0.2)
        return float(len(answered) % 2)

    data = make_data(server, reward)
    with pytest.raises(StopRun, match=r"stopped at step 2, and .* No space left") as stop:
        make_trainer(tmp_path, max_steps=9, plugins=[FullDisk()]).fit(make_module(tiny_model), data)
    assert (stop.value.code, stop.value.saved_to) == (143, "")
    assert data.session.progress() is None  # it has ended


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_run_that_goes_on_removes_nothing_that_a_stranger_s_checkpoint_names(
    tiny_model, server, tmp_path, strategy, ends_its_group
):
    victim = tmp_path / "photographs"
    victim.mkdir()
    settings = {"strategy": strategy, "enable_checkpointing": True}

    def saving():
        return ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=1)

    trainer = make_trainer(tmp_path, callbacks=[saving()], **settings)
    trainer.fit(make_module(tiny_model), make_data(server))
    (path,) = (tmp_path / "kept").iterdir()
    plain = path / "meta.pt" if path.is_dir() else path
    checkpoint = torch.load(plain, weights_only=True)
    (state,) = [s for key, s in checkpoint["callbacks"].items() if "ModelCheckpoint" in key]
    state["best_model_path"] = f"local://{victim}"
    torch.save(checkpoint, plain)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[saving()], **settings)
    trainer.fit(make_module(tiny_model), make_data(server), ckpt_path=path)
    assert trainer.global_step == 4
    assert victim.is_dir()
