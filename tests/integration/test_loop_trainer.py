"""The Trainer settings that people use, each with the real loop."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from torch.distributed.device_mesh import init_device_mesh

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.errors import ConfigError
from lightning_grpo.loader import Prepared
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import parallelize
from lightning_grpo.types import Sampling
from lightning_grpo.validation import Evaluation
from tests.fakes.loops import (
    Events,
    Recorder,
    make_data,
    make_module,
    make_prompts,
    make_trainer,
)

SERVER_DOINGS = {"generating", "idle", "paused", "updating", "out"}


class Validations(Callback):
    """The global step at each validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer, pl_module) -> None:
        self.steps.append(trainer.global_step)


def data_with_validation(server, **kwargs):
    return make_data(server, val_prompts=make_prompts(4), **kwargs)


class Careless(GRPOModule):
    def on_before_optimizer_step(self, optimizer):
        """Without a call of super."""


def test_a_module_whose_hook_would_lose_a_steps_metrics_is_refused(tiny_model, server, tmp_path):
    with pytest.raises(ConfigError, match=r"`Careless.on_before_optimizer_step` must call `super"):
        make_trainer(tmp_path, max_steps=3).fit(Careless(str(tiny_model)), make_data(server))


def test_fast_dev_run_takes_one_step_and_validates_once(tiny_model, server, tmp_path):
    validations = Validations()
    trainer = make_trainer(tmp_path, fast_dev_run=True, max_steps=-1, callbacks=[validations])
    trainer.fit(make_module(tiny_model), data_with_validation(server))
    assert trainer.global_step == 1
    assert validations.steps == [1]


def test_max_epochs_are_nominal_passes_over_the_prompts(tiny_model, server, tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(make_module(tiny_model), make_data(server, prompts=make_prompts(7)))
    assert trainer.global_step == 2 * (7 // 2)


def test_max_time_ends_the_run_at_a_step(tiny_model, server, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_time={"seconds": 1}, callbacks=[recorder])
    trainer.fit(make_module(tiny_model), make_data(server))
    assert trainer.global_step == len(recorder.steps) > 0


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, [0, 2, 4, 6, 8]),
        ({"val_check_interval": 0.5}, [0, 3, 6]),
        ({"check_val_every_n_epoch": 2, "max_steps": 13}, [0, 12]),
        ({"limit_val_batches": 0}, []),
        ({"limit_val_batches": 1.0}, [0, 6]),
        ({"limit_train_batches": 2, "max_steps": 4}, [0, 2, 4]),
    ],
)
def test_validation_runs_when_the_trainer_says_and_once_before_the_first_step(
    tiny_model, server, tmp_path, settings, steps
):
    validations = Validations()
    trainer = make_trainer(tmp_path, callbacks=[validations], **{"max_steps": 8, **settings})
    data = data_with_validation(server)
    trainer.fit(make_module(tiny_model), data)
    assert validations.steps == steps
    assert [record.step for record in data.evaluations] == steps


def test_limit_val_batches_limits_the_prompts_that_are_answered(tiny_model, server, tmp_path):
    data = make_data(server, val_prompts=make_prompts(10))  # batches of four prompts
    data.on_event = events = Events()
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=1)
    trainer.fit(make_module(tiny_model), data)
    assert len(data.evaluations[0].groups[""]) == 4
    assert len(events.of("admit")) == 2


def test_gradients_are_clipped_after_their_norm_is_logged(tiny_model, server, tmp_path):
    module, recorder = make_module(tiny_model), Recorder()
    trainer = make_trainer(tmp_path, max_steps=2, gradient_clip_val=1e-3, callbacks=[recorder])
    module.configure_model()
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    trainer.fit(module, make_data(server, batch_size=4, group_size=4))
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    moved = float((after - before).norm())
    assert max(m["policy/grad_norm"] for m in recorder.metrics) > 0.1
    assert 0 < moved <= 2 * 0.05 * 1e-3 * 1.01  # steps x learning rate x limit


def test_model_checkpoint_early_stopping_and_lr_monitor_work_on_what_is_logged(
    tiny_model, server, tmp_path
):
    best = ModelCheckpoint(
        tmp_path / "best", monitor="eval/avg_at_1", mode="max", filename="{step}", save_last=True
    )
    stopping = EarlyStopping("eval/avg_at_1", patience=2, min_delta=10.0, mode="max")
    trainer = make_trainer(
        tmp_path,
        max_steps=20,
        val_check_interval=1,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path, name="", version=0),
        callbacks=[best, stopping, LearningRateMonitor()],
    )
    module = make_module(
        tiny_model,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.5, 1.0, total_iters=4),
    )
    trainer.fit(module, data_with_validation(server))
    assert trainer.global_step < 20
    assert best.best_model_path.startswith(str(tmp_path / "best"))
    assert (tmp_path / "best" / "last.ckpt").exists()
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]]
    assert rates[:2] == pytest.approx([0.025, 0.03125])
    steps = [int(row["step"]) for row in rows if row["reward/mean"]]
    assert steps == list(range(1, trainer.global_step + 1))


def test_a_step_has_one_number_and_a_row_also_where_nobody_asked_for_rows(
    tiny_model, server, tmp_path
):
    settings = {"max_steps": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}
    for asked, steps in ((None, ["1", "2", "3"]), (2, ["2"])):
        logger = CSVLogger(tmp_path, name=str(asked))
        trainer = make_trainer(tmp_path, logger=logger, log_every_n_steps=asked, **settings)
        trainer.fit(make_module(tiny_model), data_with_validation(server))
        with (tmp_path / str(asked) / "version_0/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows if row.get("reward/mean")] == steps
        assert [row["step"] for row in rows if row["eval/avg_at_1"]] == ["0", "2"]


def test_test_prompts_are_asked_by_test_alone(tiny_model, server, tmp_path):
    module, trainer = make_module(tiny_model), make_trainer(tmp_path)
    data = data_with_validation(server, test_prompts={"a": make_prompts(3), "b": make_prompts(5)})
    (validated,) = trainer.validate(module, data, verbose=False)
    assert validated.keys() == {
        "eval/avg_at_1",
        *(f"eval/avg_at_1_ci95_{end}" for end in ("low", "high")),
    }
    tested = trainer.test(module, data, verbose=False)[0]
    assert {"test/a/avg_at_1", "test/b/avg_at_1"} <= tested.keys()
    assert not any(name.startswith("eval/") for name in tested)
    groups = data.evaluations[-1].groups
    assert [len(groups[name]) for name in ("a", "b")] == [3, 5]
    with pytest.raises(ConfigError, match=r"Set `data\.test_prompts`"):
        make_trainer(tmp_path).test(make_module(tiny_model), make_data(server))


def test_a_run_without_a_logger_leaves_the_current_folder_alone(
    tiny_model, server, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        data = data_with_validation(server)
        make_trainer(Path(), fast_dev_run=True, max_steps=-1).fit(make_module(tiny_model), data)
        assert list(data.run_dir.rglob("step_000001.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 2


def test_a_second_run_in_a_folder_that_is_taken_is_refused(tiny_model, server, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    settings = {"logger": TensorBoardLogger(tmp_path, name="", version="run")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match=f"process {other.pid} on .* has it"):
            make_trainer(tmp_path, **settings).fit(make_module(tiny_model), make_data(server))
    make_trainer(tmp_path, **settings).fit(make_module(tiny_model), make_data(server))


HOLD = """
import sys
from itertools import pairwise
from pathlib import Path
from lightning_grpo.session.folder import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_bars_loggers_and_profilers_of_lightning_work_together(tiny_model, server, tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    trainer = make_trainer(
        tmp_path,
        logger=loggers,
        profiler=SimpleProfiler(dirpath=tmp_path, filename="profile"),
        enable_progress_bar=True,
        callbacks=[RichProgressBar()],
    )
    trainer.fit(make_module(tiny_model), data_with_validation(server))
    assert list(tmp_path.glob("csv/version_0/metrics.csv"))
    for settings in tmp_path.glob("*/version_0/hparams.yaml"):
        told = yaml.safe_load(settings.read_text())
        assert told["data"]["group_size"] == trainer.datamodule.group_size
        assert told["model"]["model"] == str(tiny_model)
    assert len(list(tmp_path.glob("*/version_0/hparams.yaml"))) == 2
    assert list(tmp_path.glob("tb/version_0/events*"))
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


def test_the_advanced_profiler_works(tiny_model, server, tmp_path):
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="profile")
    trainer = make_trainer(tmp_path, max_steps=1, profiler=profiler)
    trainer.fit(make_module(tiny_model), make_data(server))
    assert (tmp_path / "fit-profile.txt").exists()


def test_fit_twice_goes_on_with_the_same_objects(tiny_model, server, tmp_path):
    module, data, recorder = make_module(tiny_model), data_with_validation(server), Recorder()
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[recorder])
    trainer.fit(module, data)
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(module, data)
    assert recorder.steps == [1, 2, 3, 4, 5]
    other = Recorder()
    make_trainer(tmp_path, max_steps=2, callbacks=[other]).fit(module, data)
    assert other.steps == [1, 2]
    assert data.session.report.probe_diff < 1e-4


def test_validate_and_test_answer_with_the_module_s_own_weights(tiny_model, server, tmp_path):
    module, data = make_module(tiny_model), data_with_validation(server)
    trainer = make_trainer(tmp_path)
    before = trainer.validate(module, data, verbose=False)
    assert before[0].keys() == {
        "eval/avg_at_1",
        *(f"eval/avg_at_1_ci95_{end}" for end in ("low", "high")),
    }
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    trainer.test(module, data, verbose=False)
    sampled = [t for g in data.evaluations[-1].groups[""] for t in g.trajectories]
    for trajectory in sampled:
        ids = torch.tensor(trajectory.input_ids)
        logprobs, _ = module.policy(ids, torch.tensor([0, len(ids)]))
        start = len(ids) - trajectory.num_response_tokens
        assert torch.allclose(
            logprobs[start:], torch.tensor(trajectory.logprobs[start:]), atol=1e-4
        )


def test_validating_answers_what_the_limit_says_and_nothing_else(tiny_model, server, tmp_path):
    asked: set[str] = set()

    def reward(completion: str, question: str) -> float:
        asked.add(question)
        return 1.0

    held_out = make_prompts(10, shuffle=False)  # batches of four prompts
    data = make_data(server, reward, prompts=make_prompts(30), val_prompts=held_out)
    data.on_event = events = Events()
    trainer = make_trainer(tmp_path, limit_val_batches=1, limit_test_batches=2)
    module = make_module(tiny_model)
    trainer.validate(module, data, verbose=False)
    assert len(asked) == 4
    asked.clear()
    trainer.test(module, data, verbose=False)
    assert len(asked) == 8
    assert "admit" not in events.names  # no training prompt


def test_held_out_prompts_are_sampled_as_the_evaluation_says(tiny_model, server, tmp_path):
    # The likeliest token alone, so that what is sampled is what is greedy.
    sampling = Sampling(max_new_tokens=4, temperature=0.5, top_k=1)
    data = make_data(
        server,
        val_prompts=make_prompts(4),
        sampling=Sampling(max_new_tokens=6),
        evaluation=Evaluation(num_samples=2, greedy=True, sampling=sampling),
    )
    make_trainer(tmp_path).validate(make_module(tiny_model), data, verbose=False)
    for group in data.evaluations[-1].groups[""]:
        assert [t.temperature for t in group.trajectories] == [0.5, 0.5, 0.0]
        assert {t.length_limit for t in group.trajectories} == {4}
        assert len({t.input_ids for t in group.trajectories}) == 1


def test_servers_of_somebody_else_are_brought_the_weights_that_they_seem_to_hold(
    tiny_model, server, tmp_path
):
    data = make_data(server, val_prompts=make_prompts(4))
    make_trainer(tmp_path).validate(make_module(tiny_model), data, verbose=False)
    assert data.session.report.updated == [server]
    assert data.session.report.version == 0


def test_epochs_ahead_count_whatever_the_length_of_those_behind(tiny_model, server, tmp_path):
    module, long, short = make_module(tiny_model), make_data(server), make_prompts(4)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, long)
    trainer.save_checkpoint(tmp_path / "long.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_data(server, prompts=short))
    assert trainer.global_step == 6 + 2
    trainer = make_trainer(tmp_path, max_epochs=3, limit_train_batches=2)
    trainer.fit(module, make_data(server), ckpt_path=tmp_path / "long.ckpt")
    assert trainer.global_step == 6 + 2 * 2


class Scheduled(GRPOModule):
    """Asks, as schedules do, how many steps there will be: Lightning loads the data for it."""

    def configure_optimizers(self):
        self.num_steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_a_schedule_may_ask_for_the_number_of_steps_also_when_resuming(
    tiny_model, server, tmp_path
):
    for epochs in (1, 2, 3):
        trainer, data = make_trainer(tmp_path, max_epochs=epochs), make_data(server)
        module = make_module(tiny_model, Scheduled)
        path = tmp_path / f"{epochs - 1}.ckpt" if epochs > 1 else None
        trainer.fit(module, data, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        assert module.num_steps == trainer.global_step == 6 * epochs
        saved = torch.load(tmp_path / f"{epochs}.ckpt", weights_only=True)["RolloutDataModule"]
        assert saved["version"] == saved["producer"]["gate"]["version"] == 6 * epochs


def test_several_sets_are_logged_under_their_names(tiny_model, server, tmp_path):
    data = make_data(server, val_prompts={"easy": make_prompts(2), "hard": make_prompts(3)})
    (scores, *_) = make_trainer(tmp_path).validate(make_module(tiny_model), data, verbose=False)
    assert {"eval/easy/avg_at_1", "eval/hard/avg_at_1"} <= scores.keys()


@pytest.mark.parametrize("which", ["last", "best", "hpc"])
def test_a_run_goes_on_from_the_checkpoint_that_is_named(tiny_model, server, tmp_path, which):
    def trainer(steps, recorder):
        checkpoint = ModelCheckpoint(
            tmp_path / "c", monitor="eval/avg_at_1", mode="max", save_last=True,
            every_n_train_steps=None,
        )  # fmt: skip
        return make_trainer(
            tmp_path,
            max_steps=steps,
            val_check_interval=1,
            enable_checkpointing=True,
            callbacks=[checkpoint, recorder],
        )

    first = trainer(2, Recorder())
    module = make_module(tiny_model)
    first.fit(module, data_with_validation(server))
    if which == "hpc":
        first.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    recorder = Recorder()
    going_on = first if which == "best" else trainer(4, recorder)
    if which == "best":
        going_on.fit_loop.epoch_loop.max_steps = 4
        going_on.callbacks.append(recorder)
    going_on.fit(make_module(tiny_model), data_with_validation(server), ckpt_path=which)
    assert recorder.steps[-1] == 4
    assert recorder.batches[-1].rollout.version == 3


def test_servers_give_their_memory_back_while_the_trainer_steps(tiny_model, server, tmp_path):
    released = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            (member,) = trainer.datamodule.session._lead.rollouts.live.pool.members
            released.append((member.released, member.routable))

        def on_validation_start(self, trainer, pl_module) -> None:
            (member,) = trainer.datamodule.session._lead.rollouts.live.pool.members
            released.append((member.released, member.routable))

    callbacks = [WeightSync(release_memory=True), Watch()]
    trainer = make_trainer(tmp_path, val_check_interval=1, callbacks=callbacks)
    trainer.fit(make_module(tiny_model), data_with_validation(server, max_staleness=0))
    during, between = (True, False), (False, True)
    assert released == [between, during, between, during, between]


def test_the_timeline_says_at_any_moment_what_each_server_does(tiny_model, server, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(make_module(tiny_model), data_with_validation(server, max_staleness=0))
    records = [
        json.loads(line) for line in next(tmp_path.rglob("timeline.jsonl")).read_text().splitlines()
    ]
    lane = [r for r in records if r.get("lane") == "server 0"]
    doings = {r["what"] for r in lane}
    assert {"generating", "updating"} < doings <= SERVER_DOINGS
    for before, after in pairwise(lane):
        assert before["at"] + before["s"] == pytest.approx(after["at"], abs=0.05)
    steps = [(r["step"], r["what"]) for r in records if r.get("lane") == "trainer"]
    assert steps[0] == (0, "validation")
    for step in (1, 2, 3):
        parts = [what for number, what in steps if number == step]
        assert parts[:4] == ["waiting", "forward and backward", "optimizer", "weight sync"]


# -- the data module in a program of the user's own, as under Fabric; the example is a slow test


def prepare(batch):
    return Prepared(batch.rewards, torch.ones(len(batch.rewards), dtype=torch.bool))


def test_a_program_without_a_trainer_gets_rollouts_and_every_held_out_answer(
    tiny_model, server, tmp_path
):
    data = make_data(server, val_prompts=make_prompts(5))
    policy = PackedPolicy(load_policy(str(tiny_model)))
    try:
        data.start(str(tiny_model), run_dir=tmp_path)
        data.publish(policy, trained=False)
        batches = iter(data.batches(prepare))
        for version in (0, 1):
            answered = [batch for loader in data.val_dataloader() for batch in loader]
            assert sum(len(batch.sampled) for batch in answered) == 5
            batch = next(batches)
            assert batch.rollout.version == version
            assert batch.is_last
            data.publish(policy)
    finally:
        data.close()


def test_sharded_weights_that_are_published_under_inference_mode_can_train_afterwards(
    tiny_model, server, tmp_path, process_group
):
    """`validate` on GPUs publishes under it; FSDP keeps what it gathers there."""
    data = make_data(server)
    policy = parallelize(PackedPolicy(load_policy(str(tiny_model))), init_device_mesh("cpu", (1,)))
    try:
        data.start(str(tiny_model), run_dir=tmp_path)
        with torch.inference_mode():
            data.publish(policy, trained=False)
        logprobs, _ = policy(torch.arange(5, 15))
        logprobs.sum().backward()
        data.publish(policy)
    finally:
        data.close()
