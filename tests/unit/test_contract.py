"""Trainer settings that can't work with rollouts, each refused with the way out."""

from __future__ import annotations

import re
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_grpo.contract import (
    check_gpus,
    check_intervals,
    check_ranks,
    check_trainer,
    describe_dtypes,
)
from lightning_grpo.datamodule import describe_data
from lightning_grpo.errors import ConfigError
from lightning_grpo.rewards import code, gsm8k
from lightning_grpo.rollout.workflow import PerDatasetWorkflow, RLVRWorkflow
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from tests.fakes.loops import NeverServers, make_data, make_trainer


def own_trainer(**settings) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, **{**quiet, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"accumulate_grad_batches": 2},
            "`trainer.accumulate_grad_batches` must be 1 (one batch is one optimizer step, its "
            "micro-batches run inside it), got 2. To save memory lower "
            "`model.max_tokens_per_microbatch`.",
        ),
        (
            {"reload_dataloaders_every_n_epochs": 1},
            "`trainer.reload_dataloaders_every_n_epochs` must be 0 (the prompt stream never "
            "ends), got 1. Leave it out.",
        ),
        (
            {"precision": "bf16-true"},
            "`trainer.precision` must be `32-true` (updates of 1e-6 vanish in bf16 weights), got "
            "`bf16-true`. For bf16 compute use `trainer.strategy: fsdp2`",
        ),
        ({"precision": "64-true"}, "`trainer.precision` must be `32-true`"),
        (
            {"overfit_batches": 1},
            "`trainer.overfit_batches` must be 0 (rollouts are sampled anew), got 1. To train on "
            "few prompts set `data.prompts.limit`.",
        ),
        (
            {"callbacks": [GradientAccumulationScheduler({4: 2})]},
            "`trainer.callbacks` must not hold GradientAccumulationScheduler (it changes what a "
            "batch is). Remove it and bound memory with `model.max_tokens_per_microbatch`.",
        ),
        *(
            (
                {"callbacks": [average]},
                f"must not hold {type(average).__name__} (servers answer with the weights that are "
                "trained, it validates and saves others). Remove it and keep the best trained "
                "weights with `ModelCheckpoint(monitor='eval/avg_at_1', mode='max')`.",
            )
            for average in (
                EMAWeightAveraging(decay=1.0),
                WeightAveraging(),
                StochasticWeightAveraging(1e-6),
            )
        ),
        (
            {"callbacks": [LearningRateFinder()]},
            "must not hold LearningRateFinder (it changes what a batch is). Remove it and set the "
            "learning rate of `model.optimizer`.",
        ),
        ({"callbacks": [BatchSizeFinder()]}, "must not hold BatchSizeFinder"),
        (
            {"callbacks": [ModelPruning("l1_unstructured", amount=0.3)]},
            "must not hold ModelPruning (servers have no place for its masks). Remove it and prune",
        ),
    ],
)
def test_what_can_t_work_is_refused_with_the_way_out(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_trainer(own_trainer(**settings))


def test_a_sharded_strategy_takes_no_precision_but_its_own():
    with pytest.raises(ConfigError, match=r"`precision` must be 32-true with FSDP2.*param_dtype"):
        own_trainer(strategy=FSDP2Strategy(), precision="bf16-mixed")
    check_trainer(own_trainer(strategy=FSDP2Strategy()))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 1.0, "max_steps": 7, "val_check_interval": 3},
        {"fast_dev_run": True},
        {"max_time": "00:01:00:00"},
    ],
)
def test_what_works_passes(settings):
    trainer = own_trainer(**settings)
    check_trainer(trainer)
    check_intervals(trainer, steps_per_rollout=1, epoch_steps=10)


@pytest.mark.parametrize(
    ("settings", "name", "got", "nearest"),
    [
        ({"max_steps": 10}, "trainer.max_steps", 10, 12),
        ({"fast_dev_run": True}, "trainer.fast_dev_run", 1, 4),
        ({"val_check_interval": 5}, "trainer.val_check_interval", 5, 4),
        ({"val_check_interval": 0.25}, "trainer.val_check_interval", 10, 12),
        (
            {"val_check_interval": 0.5, "limit_train_batches": 12},
            "trainer.val_check_interval",
            6,
            8,
        ),
        (
            {"val_check_interval": 0.5, "limit_train_batches": 0.3},
            "trainer.val_check_interval",
            6,
            8,
        ),
        ({"limit_train_batches": 6}, "trainer.limit_train_batches", 6, 8),
        ({"limit_train_batches": 0.55}, "trainer.limit_train_batches", 22, 24),
        (
            {"callbacks": [ModelCheckpoint(every_n_train_steps=1)]},
            "ModelCheckpoint.every_n_train_steps",
            1,
            4,
        ),
    ],
)
def test_what_would_cut_a_rollout_batch_is_refused_with_the_nearest(settings, name, got, nearest):
    with pytest.raises(ConfigError) as refusal:
        check_intervals(own_trainer(**settings), steps_per_rollout=4, epoch_steps=40)
    assert str(refusal.value).startswith(f"`{name}` must be a multiple of 4")
    assert f"got {got} steps" in str(refusal.value)
    assert str(refusal.value).endswith(f"The nearest is {nearest}.")


@pytest.mark.parametrize(("limit", "longest"), [(None, 40), (12, 12), (0.5, 20), (60, 40)])
def test_a_validation_that_no_epoch_reaches_is_refused_with_the_way_out(limit, longest):
    def check(interval, **settings):
        trainer = own_trainer(val_check_interval=interval, limit_train_batches=limit, **settings)
        check_intervals(trainer, steps_per_rollout=1, epoch_steps=40)

    check(longest)
    check(longest + 1, check_val_every_n_epoch=None)
    check(longest + 1, limit_val_batches=0)
    with pytest.raises(ConfigError) as refusal:
        check(longest + 1)
    message = str(refusal.value)
    assert message.startswith(f"`trainer.val_check_interval` must be at most {longest}, the steps")
    assert f"got {longest + 1}." in message
    assert "`trainer.check_val_every_n_epoch: null`" in message


def test_intervals_between_rollout_batches_pass():
    trainer = own_trainer(
        max_steps=12,
        val_check_interval=0.5,
        callbacks=[ModelCheckpoint(every_n_train_steps=8), ModelCheckpoint(monitor="eval/x")],
    )
    check_intervals(trainer, steps_per_rollout=4, epoch_steps=40)
    check_intervals(own_trainer(fast_dev_run=2), steps_per_rollout=2, epoch_steps=40)


def test_a_clock_may_not_save_between_the_steps_of_a_rollout_batch():
    saving = {"callbacks": [ModelCheckpoint(train_time_interval=timedelta(minutes=5))]}
    check_intervals(own_trainer(**saving), steps_per_rollout=1, epoch_steps=40)
    with pytest.raises(ConfigError, match=r"train_time_interval` must be null.*0:05:00"):
        check_intervals(own_trainer(**saving), steps_per_rollout=4, epoch_steps=40)


def test_a_clock_may_not_validate_between_the_steps_of_a_rollout_batch():
    trainer = own_trainer(val_check_interval="00:00:05:00")
    check_intervals(trainer, steps_per_rollout=1, epoch_steps=40)
    with pytest.raises(ConfigError, match=r"`trainer\.val_check_interval` must be a number of"):
        check_intervals(trainer, steps_per_rollout=4, epoch_steps=40)


def test_a_clock_may_not_stop_between_the_steps_of_a_rollout_batch():
    trainer = own_trainer(max_time="00:00:05:00")
    check_intervals(trainer, steps_per_rollout=1, epoch_steps=40)
    with pytest.raises(ConfigError, match=r"max_time` must be null .* got 300\.0 s.*SIGTERM"):
        check_intervals(trainer, steps_per_rollout=4, epoch_steps=40)


def test_more_ranks_than_a_minibatch_has_sequences_are_refused():
    check_ranks(8, 8)
    with pytest.raises(ConfigError, match=r"at most the sequences .* = 8\), got 9 ranks"):
        check_ranks(9, 8)
    check_ranks(16, 8, row_ranks=2)
    with pytest.raises(ConfigError, match="got 18 ranks, 2 of which compute each sequence togeth"):
        check_ranks(18, 8, row_ranks=2)


def test_gpus_that_train_and_serve_must_be_the_same_or_apart():
    check_gpus([0], [0])
    check_gpus([0, 1], [2, 3])
    check_gpus([0, 1], [])
    with pytest.raises(ConfigError, match=r"both use GPU \[1\].*what the servers leave: \[0\]"):
        check_gpus([0, 1], [1])
    with pytest.raises(ConfigError, match=r"name fewer in `servers\.devices`"):
        check_gpus([1], [0, 1])


# ---- the line that names every precision --------------------------------------------------------


def described(tmp_path, **settings) -> str:
    policy = torch.nn.Linear(2, 2)
    trainer = make_trainer(tmp_path, **settings)
    trainer.optimizers = [torch.optim.SGD(policy.parameters(), lr=0.1)]
    return describe_dtypes(trainer, policy, {"wire": "bfloat16", "server": "auto"})


def test_plain_training_computes_in_what_the_weights_are(tmp_path):
    assert described(tmp_path) == (
        "weights float32, compute float32, gradients float32, optimizer float32, wire bfloat16, "
        "server auto"
    )


def test_autocast_and_the_sharding_policy_are_told(tmp_path):
    assert "compute bfloat16 (autocast), grad" in described(tmp_path, precision="bf16-mixed")
    strategy = FSDP2Strategy(param_dtype="bfloat16", reduce_dtype="float32")
    assert "compute bfloat16, gradients float32, opt" in described(tmp_path, strategy=strategy)
    assert "compute float32, gradients float32, opt" in described(tmp_path, strategy="fsdp2")


def test_a_batch_of_more_prompts_than_there_are_is_said():
    data = make_data(NeverServers(), batch_size=4)
    few = "3 (fewer than a batch of 4: some are asked several times in each), and held out none"
    assert describe_data(data, 3, {})["prompts"] == few
    assert describe_data(data, 4, {})["prompts"] == "4, and held out none"


def test_what_holds_programs_of_the_policy_is_said():
    programs = make_data(NeverServers(), code, batch_size=4)
    assert "resource limits" in describe_data(programs, 4, {})["programs"]
    sampling = programs.workflow.sampling
    several = PerDatasetWorkflow({"": programs.workflow, "sums": RLVRWorkflow(gsm8k, sampling)})
    assert several.runs_programs
    assert "programs" not in describe_data(make_data(NeverServers(), gsm8k), 4, {})
