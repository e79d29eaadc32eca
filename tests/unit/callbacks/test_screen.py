from __future__ import annotations

import io
import threading
from collections import deque
from dataclasses import replace

import pytest
import tqdm
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from rich.console import Console

from lightning_grpo.callbacks.screen import (
    GRPOProgress,
    RunSummary,
    Tally,
    WaitTeller,
    end_lines,
    evaluation_line,
    held_out_lines,
    most_improved,
    phase_shares,
    progress_line,
    waiting_fraction,
)
from lightning_grpo.types import RolloutProgress
from tests.fakes.tiny_run import TinyData, TinyEvaluation, TinyModule, make_group

METRICS = {
    "reward/mean": 0.5,
    "staleness/mean": 0.75,
    "completion/length_mean": 37.6,
    "throughput/tokens_per_s": 1234.5,
    "time/step_s": 2.0,
    "time/wait_rollout_s": 0.5,
}


def test_a_line_holds_what_a_run_is_judged_by():
    line = progress_line(7, 30, METRICS, deque([0.3, 0.5]))
    assert line == (
        "step  7/30 | reward 0.500 (mean of 2: 0.400) | staleness 0.75 | length 38 | "
        "1,234 tokens/s | 2.0 s/step | waiting 25%"
    )


def test_the_share_of_the_peak_is_shown_where_it_is_known():
    line = progress_line(7, 30, {**METRICS, "throughput/mfu": 0.0412}, deque())
    assert " | 1,234 tokens/s | mfu 4.1% | 2.0 s/step" in line


def test_what_was_not_measured_is_left_out():
    assert progress_line(7, None, {}, deque()) == "step 7"


def test_the_logged_idle_fraction_wins_over_the_computed_one():
    assert waiting_fraction({**METRICS, "idle/trainer_fraction": 0.1}) == 0.1


def test_a_held_out_score_is_shown_with_its_interval():
    scores = {
        "eval/avg_at_1": 0.5,
        "eval/avg_at_1_ci95_low": 0.48,
        "eval/avg_at_1_ci95_high": 0.52,
        "eval/greedy": 0.4,
        "eval/greedy_ci95_low": float("nan"),
        "eval/greedy_ci95_high": float("nan"),
    }
    assert evaluation_line(10, scores) == (
        "held-out at step 10 | avg_at_1 0.500 (0.480 to 0.520) | greedy 0.400"
    )


def test_the_step_of_a_validation_is_the_one_that_its_record_says(make_trainer, console, printed):
    trainer = make_trainer(callbacks=[GRPOProgress(console)], limit_val_batches=1)
    trainer.validate(TinyModule(), datamodule=TinyData(evaluations=[TinyEvaluation(30, {})]))
    assert printed().startswith("held-out at step 30 | avg_at_1 0.250")


def test_one_line_is_printed_per_rollout_batch_not_per_step(make_trainer, console, printed):
    trainer = make_trainer(callbacks=[GRPOProgress(console)])
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=3))
    lines = printed().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    assert "reward 0.500 (mean of 3: 0.500)" in lines[-1]


def test_a_validation_gets_its_own_line(make_trainer, console, printed):
    trainer = make_trainer(callbacks=[GRPOProgress(console)], limit_val_batches=1)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert "held-out at step 2 | avg_at_1 0.250 (0.125 to 0.375)" in printed().splitlines()


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(make_trainer):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = GRPOProgress(terminal)
    make_trainer(callbacks=[progress]).fit(TinyModule(), datamodule=TinyData())
    written = terminal.file.getvalue()
    assert "train" in written
    assert "4/4" in written
    assert "\x1b[?25h" in written  # the cursor is shown again


@pytest.mark.parametrize("make_bar", [TQDMProgressBar, RichProgressBar])
def test_a_default_bar_makes_way(make_bar, make_trainer, console, printed, monkeypatch):
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # no thread that outlives the test
    bar = make_bar()
    trainer = make_trainer(callbacks=[bar])
    trainer.callbacks.append(GRPOProgress(console))
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert bar.is_disabled
    assert "step 4/4" in printed()


def test_a_bar_with_settings_of_its_own_stays(make_trainer, console, printed):
    bar = RichProgressBar(refresh_rate=2)
    trainer = make_trainer(callbacks=[bar])
    trainer.callbacks.append(GRPOProgress(console))
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert bar.is_enabled
    assert "step 4/4" in printed()


class Waiting:
    """A wait that is looked at by hand, on a clock that is set."""

    def __init__(self, tells=lambda waited_s, told_s: True):
        self.now = 100.0
        self.progress = RolloutProgress(0, 64, 0, 0)
        self.told = []
        self.tells = tells
        self.teller = WaitTeller(lambda: self.progress, self.tell, lambda: self.now)

    def tell(self, words, waited_s, told_s):
        if not self.tells(waited_s, told_s):
            return False
        self.told.append(words)
        return True

    def after(self, seconds, done=0, evaluated=0, tokens=0):
        self.now += seconds
        self.progress = RolloutProgress(done, 64, evaluated, tokens)
        self.teller.look()


def test_a_wait_for_rollouts_is_told_by_completions_and_tokens():
    waiting = Waiting()
    waiting.teller.begin("rollouts")
    waiting.after(0)
    waiting.after(10, done=16, tokens=5_000)
    assert waiting.told == ["rollouts | 16 of 64 completions | 500 tokens/s | 10 s"]


def test_a_wait_for_held_out_prompts_counts_their_answers_alone():
    waiting = Waiting()
    waiting.teller.begin("held-out prompts")
    waiting.after(0, evaluated=300)
    waiting.after(4, done=16, evaluated=340, tokens=8_000)
    assert waiting.told == ["held-out prompts | 40 completions | 2,000 tokens/s | 4 s"]
    waiting.teller.begin("held-out prompts", 500)
    waiting.after(0, evaluated=340)
    waiting.after(2, evaluated=390, tokens=8_000)
    assert waiting.told[1] == "held-out prompts | 50 of 500 completions | 4,000 tokens/s | 2 s"


def test_nothing_is_told_of_a_wait_that_is_over_or_of_which_nothing_is_known():
    waiting = Waiting()
    waiting.after(10)
    waiting.teller.begin("rollouts")
    waiting.progress = None
    waiting.teller.look()
    waiting.teller.end()
    waiting.after(10)
    assert waiting.told == []


def test_without_a_terminal_a_wait_is_told_after_ten_seconds_then_every_thirty(printed, console):
    progress = GRPOProgress(console)
    waiting = Waiting()
    waiting.tell = lambda words, waited_s, told_s: progress._tell(words, waited_s, told_s)
    waiting.teller._tell = waiting.tell
    waiting.teller.begin("rollouts")
    for second in range(60):
        waiting.after(1, done=second)
    seconds = [line.rpartition("| ")[2] for line in printed().splitlines()]
    assert seconds == ["9 s", "39 s"]


class Rolling(TinyData):
    def progress(self):
        return RolloutProgress(1, 4, 0, 100)


def test_a_run_begins_and_ends_the_teller(make_trainer, console):
    before = threading.active_count()
    make_trainer(callbacks=[GRPOProgress(console)]).fit(TinyModule(), datamodule=Rolling())
    make_trainer(callbacks=[GRPOProgress(console)], limit_val_batches=1).validate(
        TinyModule(), datamodule=Rolling()
    )
    assert threading.active_count() == before


def test_several_rewards_are_shown_each_by_its_name():
    metrics = {"reward/mean": 1.25, "reward/right/mean": 1.0, "reward/short/mean": 0.25}
    line = progress_line(3, 9, metrics, deque([1.25]))
    assert "reward 1.250 (mean of 1: 1.250) [right 1.000, short 0.250]" in line
    assert "[" not in progress_line(3, 9, {"reward/mean": 1.0, "reward/a/mean": 1.0}, deque())


# ---- summary ------------------------------------------------------------------------------------

BEFORE = TinyEvaluation(
    0,
    {"eval/avg_at_1": 0.25, "eval/avg_at_1_ci95_low": 0.125, "eval/avg_at_1_ci95_high": 0.375},
    {"": [make_group(0, (0.0,)), make_group(1, (0.0,)), make_group(2, (1.0,))]},
)
AFTER = TinyEvaluation(
    30,
    {"eval/avg_at_1": 0.75, "eval/avg_at_1_ci95_low": 0.625, "eval/avg_at_1_ci95_high": 0.875},
    {"": [make_group(0, (0.0,)), make_group(1, (1.0,)), make_group(2, (1.0,))]},
)


def test_held_out_scores_are_told_before_and_after():
    first = next(held_out_lines([BEFORE, AFTER]))
    assert first == "held-out      0.250 -> 0.750 (0.625 to 0.875) avg_at_1, step 0 -> 30"


def test_a_single_validation_is_no_change():
    assert list(held_out_lines([AFTER])) == [
        "held-out      0.750 (0.625 to 0.875) avg_at_1, step 30"
    ]


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
    assert lines[-2:] == [
        "              lightning-grpo report runs/a",
        "              lightning-grpo show runs/a",
    ]


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
