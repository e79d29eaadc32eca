from __future__ import annotations

from dataclasses import replace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grpo.callbacks.screen import (
    RunSummary,
    Tally,
    end_lines,
    held_out_lines,
    most_improved,
    phase_shares,
)
from tests.fakes.tiny_run import TinyData, TinyEvaluation, TinyModule, make_group

BEFORE = TinyEvaluation(
    0,
    {"eval/avg_at_1": 0.25, "eval/avg_at_1_ci95": 0.125},
    {"": [make_group(0, (0.0,)), make_group(1, (0.0,)), make_group(2, (1.0,))]},
)
AFTER = TinyEvaluation(
    30,
    {"eval/avg_at_1": 0.75, "eval/avg_at_1_ci95": 0.125},
    {"": [make_group(0, (0.0,)), make_group(1, (1.0,)), make_group(2, (1.0,))]},
)


def test_held_out_scores_are_told_before_and_after():
    first = next(held_out_lines([BEFORE, AFTER]))
    assert first == "held-out      0.250 -> 0.750 (+- 0.125) avg_at_1, step 0 -> 30"


def test_a_single_validation_is_no_change():
    assert list(held_out_lines([AFTER])) == ["held-out      0.750 (+- 0.125) avg_at_1, step 30"]


def test_the_problem_that_gained_most_is_answered_before_and_after():
    assert list(held_out_lines([BEFORE, AFTER]))[1:] == [
        "problem       What is 1 + 1?",
        "before        [reward 0] answer 0",
        "after         [reward 1] answer 0",
    ]


def test_an_answer_does_not_command_the_terminal():
    group = make_group(1, (1.0,))
    answer = replace(group.trajectories[0], text="\x1b[2J7")
    after = TinyEvaluation(30, {}, {"": [replace(group, trajectories=(answer,))]})
    assert list(held_out_lines([BEFORE, after]))[-1] == r"after         [reward 1] \x1b[2J7"


def test_problems_are_matched_within_their_validation_set():
    first = TinyEvaluation(0, {}, {"easy": [make_group(1, (0.0,))]})
    last = TinyEvaluation(9, {}, {"hard": [make_group(1, (1.0,))]})
    assert most_improved(first, last) is None


def test_a_run_without_validation_says_so():
    assert list(held_out_lines([])) == ["held-out      not measured: no validation ran"]


def test_time_is_shared_out_largest_first_with_the_rest_as_other():
    tally = Tally(seconds=100.0, phases={"optimizer": 10.0, "waiting for rollouts": 60.0})
    assert phase_shares(tally) == "waiting for rollouts 60%, other 30%, optimizer 10%"


def test_what_to_run_next_names_the_checkpoint():
    lines = list(end_lines(Tally(seconds=2.0, samples=8), [], "runs/a/x.ckpt", "runs/a"))
    assert "speed         8 samples in 2 s without validation: 4 samples/s" in lines
    assert "next          lightning-grpo export runs/a/x.ckpt runs/a/model" in lines
    assert "              lightning-grpo show runs/a" in lines


def test_a_run_prints_its_settings_first_and_its_result_last(
    make_trainer, console, printed, tmp_path
):
    trainer = make_trainer(
        callbacks=[RunSummary(console), ModelCheckpoint(dirpath=tmp_path / "saved")],
        enable_checkpointing=True,
        enable_progress_bar=False,
    )
    trainer.fit(TinyModule(), datamodule=TinyData(3, [BEFORE, AFTER]))
    lines = printed().splitlines()
    assert lines[1:5] == [
        f"run           {tmp_path}",
        "model         tiny (1 parameter, float32)",
        "batch         2 prompts x 2 samples",
        "              2 optimizer steps each",
    ]
    text = printed()
    assert "12 samples in" in text
    assert "0.250 -> 0.750" in text
    assert f"model         {tmp_path}/saved/epoch=0-step=6.ckpt" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"max_steps": 3},
            "before the first step only: they would be every 8 steps of an epoch of 8",
        ),
        ({"max_steps": 8}, ""),
        ({"max_steps": 3, "val_check_interval": 2}, ""),
        ({"max_steps": 3, "val_check_interval": 4}, "every 4 steps of an epoch of 8"),
        ({"max_steps": 9, "val_check_interval": 9, "check_val_every_n_epoch": None}, ""),
        (
            {"max_steps": 8, "val_check_interval": 9, "check_val_every_n_epoch": None},
            "every 9 steps (`val_check_interval`), and the run ends at step 8",
        ),
        ({"max_epochs": 1, "check_val_every_n_epoch": 2}, "before the first step only"),
        ({"max_epochs": 2, "check_val_every_n_epoch": 2}, ""),
        ({"max_steps": 3, "limit_val_batches": 0}, ""),
    ],
    ids=str,
)
def test_a_run_that_ends_before_its_next_validation_says_so_at_the_start(
    make_trainer, console, printed, settings, words
):
    limits = {"limit_val_batches": 1, "max_epochs": -1, **settings}
    trainer = make_trainer(callbacks=[RunSummary(console)], enable_progress_bar=False, **limits)
    trainer.fit(TinyModule(), datamodule=TinyData(4))
    said = [line for line in printed().splitlines() if line.startswith("held-out      answered")]
    assert bool(said) == bool(words)
    assert words in " ".join(printed().split())


@pytest.mark.parametrize(
    ("samples", "rate"), [(7, "0.28 samples/s"), (100, "4 samples/s"), (31_250, "1,250 samples/s")]
)
def test_a_slow_run_has_a_speed_too(samples, rate):
    lines = list(end_lines(Tally(seconds=25.0, samples=samples), [], "", "runs/a"))
    assert any(line.endswith(f": {rate}") for line in lines)


def test_a_run_that_failed_prints_no_result(make_trainer, console, printed):
    class Failing(TinyModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("lost")

    trainer = make_trainer(callbacks=[RunSummary(console)], enable_progress_bar=False)
    with pytest.raises(RuntimeError, match="lost"):
        trainer.fit(Failing(), datamodule=TinyData())
    assert "tiny (1 parameter" in printed()
    assert "samples" not in printed().split("each")[1]
