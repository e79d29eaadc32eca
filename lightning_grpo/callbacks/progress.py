"""GRPOProgress: one readable line per rollout batch, and a bar below them on a terminal."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lightning_grpo.callbacks.views import (
    Asking,
    MinibatchView,
    Rolling,
    evaluated_step,
    logged_numbers,
)
from lightning_grpo.types import RolloutProgress

_MEAN_OVER = 5
_FIRST_WORD_S, _NEXT_WORD_S, _REDRAW_S = 10.0, 30.0, 1.0
"""Where there is no terminal: a wait is told after so long, and then so often."""


class GRPOProgress(ProgressBar):
    """Says after each rollout batch what a run is judged by.

    It takes the place of a bar as Lightning makes it by default; a bar with settings of its own
    stays, with these lines beside it.

    Args:
        console: Where to write; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._rewards: deque[float] = deque(maxlen=_MEAN_OVER)
        self._enabled = self._with_bar = True
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._wait: WaitTeller | None = None

    def disable(self) -> None:
        """Say nothing (Lightning calls it on other ranks)."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Write above the bar."""
        self._say(" ".join(str(arg) for arg in args))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Speak on the first rank only, and silence Lightning's own bar where it is the default."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()
        others = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, ProgressBar) and callback is not self
        ]
        for other in others:
            if is_default_bar(other):
                other.disable()
        self._with_bar = all(is_default_bar(other) for other in others)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar on a terminal, and begin to tell of long waits."""
        self._begin_to_wait(trainer, _ROLLOUTS)
        if not (self._enabled and self._with_bar and self._console.is_terminal):
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
        self._task = self._bar.add_task("train", total=total_steps(trainer))
        self._bar.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The wait for this batch is over."""
        if self._wait is not None:
            self._wait.end()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MinibatchView,
        batch_idx: int,
    ) -> None:
        """Move the bar; after the last step on a rollout batch, say the line."""
        self._begin_to_wait(trainer, _ROLLOUTS)
        if batch.is_last:
            metrics = logged_numbers(trainer)
            if "reward/mean" in metrics:
                self._rewards.append(metrics["reward/mean"])
            self._say(
                progress_line(trainer.global_step, total_steps(trainer), metrics, self._rewards)
            )
        self._move(trainer.global_step, "train")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say in the bar why training waits."""
        self._move(trainer.global_step, "held-out prompts")
        testing = trainer.state.fn == TrainerFn.TESTING
        asked = trainer.test_dataloaders if testing else trainer.val_dataloaders
        loaders = asked if isinstance(asked, list) else [asked]
        wanted = sum(loader.num_answers for loader in loaders if isinstance(loader, Asking))
        self._begin_to_wait(trainer, _HELD_OUT, wanted)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say the held-out scores."""
        scores = {k: v for k, v in logged_numbers(trainer).items() if k.startswith(_SCORES)}
        if scores and not trainer.sanity_checking:
            self._say(evaluation_line(evaluated_step(trainer), scores))
        self._move(trainer.global_step, "train")
        if trainer.state.fn == TrainerFn.FITTING:
            self._begin_to_wait(trainer, _ROLLOUTS)
        else:
            self._close()

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the terminal is left as it was."""
        self._close()

    def _begin_to_wait(self, trainer: L.Trainer, what: str, wanted: int = 0) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self._wait is None and self._enabled and isinstance(data, Rolling):
            self._wait = WaitTeller(data.progress, self._tell)
            self._wait.start()
        if self._wait is not None:
            self._wait.begin(what, wanted)

    def _tell(self, words: str, waited_s: float, told_s: float) -> bool:
        """Show how far a wait is: in the bar at once, else in a line now and then."""
        if self._bar is not None:
            self._bar.update(self._task, description=words, refresh=True)
            return True
        if waited_s < _FIRST_WORD_S or told_s < _NEXT_WORD_S:
            return False
        self._say(words)
        return True

    def _say(self, line: str) -> None:
        if self._enabled:
            self._console.print(line, markup=False, soft_wrap=True)

    def _move(self, step: int, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=what, refresh=True)

    def _close(self) -> None:
        if self._wait is not None:
            self._wait.close()
            self._wait = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


_SCORES = ("eval/", "test/")
_ROLLOUTS, _HELD_OUT = "rollouts", "held-out prompts"


class WaitTeller:
    """Tells how far a wait for completions is, from a thread of its own.

    Args:
        progress: How far the rollouts are; None: not known.
        tell: Given the words, the seconds waited, and those since it last returned True.
        clock: Seconds.
    """

    def __init__(
        self,
        progress: Callable[[], RolloutProgress | None],
        tell: Callable[[str, float, float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._tell, self._clock = progress, tell, clock
        self._what, self._wanted = "", 0
        self._since = self._told = -math.inf
        self._before: tuple[float, RolloutProgress] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wait teller", daemon=True)

    def start(self) -> None:
        """Look once a second from now on."""
        self._thread.start()

    def begin(self, what: str, wanted: int = 0) -> None:
        """A wait begins.

        Args:
            what: What for.
            wanted: How many held-out completions; 0: not known.
        """
        self._wanted, self._since, self._before = wanted, self._clock(), None
        self._what = what

    def end(self) -> None:
        """The wait is over."""
        self._what = ""

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def look(self) -> None:
        """Tell now, if there is a wait and something is known of it."""
        what, since, now = self._what, self._since, self._clock()
        progress = self._progress() if what else None
        if progress is None:
            return
        if self._before is None:
            self._before = (now, progress)
            return
        seconds = now - self._before[0]
        words = wait_words(what, progress, self._before[1], seconds, self._wanted)
        if self._what == what and self._tell(words, now - since, now - self._told):
            self._told = now

    def _run(self) -> None:
        while not self._closed.wait(_REDRAW_S):
            self.look()


def wait_words(
    what: str, now: RolloutProgress, before: RolloutProgress, seconds: float, wanted: int = 0
) -> str:
    """How far a wait is: completions done of those wanted, and how fast tokens come.

    Args:
        what: What is waited for.
        now: How far the rollouts are.
        before: The same when the wait began.
        seconds: Since then.
        wanted: How many held-out completions; 0: not known.
    """
    done = f"{now.evaluated - before.evaluated:,}" + (f" of {wanted:,}" if wanted else "")
    if what == _ROLLOUTS:
        done = f"{now.done:,} of {now.wanted:,}"
    speed = (now.tokens - before.tokens) / max(seconds, 1e-9)
    return f"{what} | {done} completions | {speed:,.0f} tokens/s | {seconds:.0f} s"


def is_default_bar(bar: ProgressBar) -> bool:
    """Whether it is as Lightning makes one when the user names none."""
    if type(bar) is RichProgressBar:
        default = RichProgressBar()
        return (bar.refresh_rate, bar.theme) == (default.refresh_rate, default.theme)
    return type(bar) is TQDMProgressBar and bar.refresh_rate == TQDMProgressBar().refresh_rate


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps that the run will take, as far as its limits say it.

    `trainer.estimated_stepping_batches` is not asked: it may set the loaders up early.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    length = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and isinstance(length, int):
        limits.append(trainer.max_epochs * length)
    return min(limits, default=None)


def progress_line(
    step: int, total: int | None, metrics: Mapping[str, float], rewards: deque[float]
) -> str:
    """One rollout batch in one line; what was not measured is left out."""
    count = f"step {step}" if total is None else f"step {step:>{len(str(total))}}/{total}"
    parts = [count]
    if "reward/mean" in metrics:
        mean = f" (mean of {len(rewards)}: {sum(rewards) / len(rewards):.3f})" if rewards else ""
        parts.append(f"reward {metrics['reward/mean']:.3f}{mean}{named_rewards(metrics)}")
    parts += [text.format(metrics[name]) for name, text in _COLUMNS.items() if name in metrics]
    waiting = waiting_fraction(metrics)
    if waiting is not None:
        parts.append(f"waiting {waiting:.0%}")
    return " | ".join(parts)


def named_rewards(metrics: Mapping[str, float]) -> str:
    """Each reward's own mean in brackets, where there are several."""
    matches = ((re.fullmatch("reward/(.+)/mean", name), v) for name, v in metrics.items())
    named = [f"{match[1]} {value:.3f}" for match, value in matches if match]
    return f" [{', '.join(named)}]" if len(named) > 1 else ""


_COLUMNS = {
    "staleness/mean": "staleness {:.2g}",
    "completion/length_mean": "length {:.0f}",
    "throughput/tokens_per_s": "{:,.0f} tokens/s",
    "time/step_s": "{:.1f} s/step",
}


def waiting_fraction(metrics: Mapping[str, float]) -> float | None:
    """The part of its time that the trainer waited for rollouts, where it is known."""
    if "idle/trainer_fraction" in metrics:
        return metrics["idle/trainer_fraction"]
    step_s = metrics.get("time/step_s", 0.0)
    return metrics["time/wait_rollout_s"] / step_s if _both(metrics) and step_s > 0 else None


def _both(metrics: Mapping[str, float]) -> bool:
    return "time/wait_rollout_s" in metrics and "time/step_s" in metrics


def evaluation_line(step: int, scores: Mapping[str, float]) -> str:
    """The held-out scores in one line, each with its 95 % interval where there is one."""
    parts = []
    for name, value in scores.items():
        if name.endswith("_ci95"):
            continue
        interval = scores.get(f"{name}_ci95")
        shown = f" +- {interval:.3f}" if interval is not None and interval == interval else ""
        parts.append(f"{name.partition('/')[2]} {value:.3f}{shown}")
    asked = "test" if any(name.startswith("test/") for name in scores) else "held-out"
    return f"{asked} at step {step} | " + " | ".join(parts)
