from __future__ import annotations

import io
import threading
from collections import deque

import pytest
import tqdm
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console

from lightning_grpo.callbacks.screen import (
    GRPOProgress,
    WaitTeller,
    evaluation_line,
    progress_line,
    waiting_fraction,
)
from lightning_grpo.types import RolloutProgress
from tests.fakes.tiny_run import TinyData, TinyEvaluation, TinyModule

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


def test_what_was_not_measured_is_left_out():
    assert progress_line(7, None, {}, deque()) == "step 7"


def test_the_logged_idle_fraction_wins_over_the_computed_one():
    assert waiting_fraction({**METRICS, "idle/trainer_fraction": 0.1}) == 0.1


def test_a_held_out_score_is_shown_with_its_interval():
    scores = {
        "eval/avg_at_1": 0.5,
        "eval/avg_at_1_ci95": 0.02,
        "eval/greedy": 0.4,
        "eval/greedy_ci95": float("nan"),
    }
    assert evaluation_line(10, scores) == (
        "held-out at step 10 | avg_at_1 0.500 +- 0.020 | greedy 0.400"
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
    assert "held-out at step 2 | avg_at_1 0.250 +- 0.125" in printed().splitlines()


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
