"""Trainer settings that can't work with rollouts, each refused with the way out."""

from __future__ import annotations

import re
from datetime import timedelta

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_grpo.contract import check_gpus, check_intervals, check_ranks, check_trainer
from lightning_grpo.errors import ConfigError
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy


def make_trainer(**settings) -> L.Trainer:
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
    ],
)
def test_what_can_t_work_is_refused_with_the_way_out(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_trainer(make_trainer(**settings))


def test_a_sharded_strategy_takes_no_precision_but_its_own():
    with pytest.raises(ConfigError, match=r"`precision` must be 32-true with FSDP2.*param_dtype"):
        make_trainer(strategy=FSDP2Strategy(), precision="bf16-mixed")
    check_trainer(make_trainer(strategy=FSDP2Strategy()))


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
    trainer = make_trainer(**settings)
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
        check_intervals(make_trainer(**settings), steps_per_rollout=4, epoch_steps=40)
    assert str(refusal.value).startswith(f"`{name}` must be a multiple of 4")
    assert f"got {got} steps" in str(refusal.value)
    assert str(refusal.value).endswith(f"The nearest is {nearest}.")


@pytest.mark.parametrize(("limit", "longest"), [(None, 40), (12, 12), (0.5, 20), (60, 40)])
def test_a_validation_that_no_epoch_reaches_is_refused_with_the_way_out(limit, longest):
    def check(interval, **settings):
        trainer = make_trainer(val_check_interval=interval, limit_train_batches=limit, **settings)
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
    trainer = make_trainer(
        max_steps=12,
        val_check_interval=0.5,
        callbacks=[ModelCheckpoint(every_n_train_steps=8), ModelCheckpoint(monitor="eval/x")],
    )
    check_intervals(trainer, steps_per_rollout=4, epoch_steps=40)
    check_intervals(make_trainer(fast_dev_run=2), steps_per_rollout=2, epoch_steps=40)


def test_a_clock_may_not_save_between_the_steps_of_a_rollout_batch():
    saving = {"callbacks": [ModelCheckpoint(train_time_interval=timedelta(minutes=5))]}
    check_intervals(make_trainer(**saving), steps_per_rollout=1, epoch_steps=40)
    with pytest.raises(ConfigError, match=r"train_time_interval` must be null.*0:05:00"):
        check_intervals(make_trainer(**saving), steps_per_rollout=4, epoch_steps=40)


def test_a_clock_may_not_validate_between_the_steps_of_a_rollout_batch():
    trainer = make_trainer(val_check_interval="00:00:05:00")
    check_intervals(trainer, steps_per_rollout=1, epoch_steps=40)
    with pytest.raises(ConfigError, match=r"`trainer\.val_check_interval` must be a number of"):
        check_intervals(trainer, steps_per_rollout=4, epoch_steps=40)


def test_a_clock_may_not_stop_between_the_steps_of_a_rollout_batch():
    trainer = make_trainer(max_time="00:00:05:00")
    check_intervals(trainer, steps_per_rollout=1, epoch_steps=40)
    with pytest.raises(ConfigError, match=r"max_time` must be null .* got 300\.0 s.*SIGTERM"):
        check_intervals(trainer, steps_per_rollout=4, epoch_steps=40)


def test_more_ranks_than_a_minibatch_has_sequences_are_refused():
    check_ranks(8, 8)
    with pytest.raises(ConfigError, match=r"at most the sequences .* = 8\), got 9 ranks"):
        check_ranks(9, 8)


def test_gpus_that_train_and_serve_must_be_the_same_or_apart():
    check_gpus([0], [0])
    check_gpus([0, 1], [2, 3])
    check_gpus([0, 1], [])
    with pytest.raises(ConfigError, match=r"both use GPU \[1\].*what the servers leave: \[0\]"):
        check_gpus([0, 1], [1])
    with pytest.raises(ConfigError, match=r"name fewer in `servers\.devices`"):
        check_gpus([1], [0, 1])
