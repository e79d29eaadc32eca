"""The screen of a run: a line per step, and a summary at both ends."""

from __future__ import annotations

import math
import re
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lightning_grpo.contract import (
    Asking,
    Described,
    Evaluated,
    Rolling,
    evaluated_step,
    logged_numbers,
    remaining_steps,
    run_folder,
)
from lightning_grpo.errors import printable
from lightning_grpo.hparams import arguments_of, loggable
from lightning_grpo.loader import Minibatch
from lightning_grpo.types import CI_HIGH, CI_LOW, Group, RolloutProgress, is_interval
from lightning_grpo.validation import EvaluationRecord

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
        batch: Minibatch,
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
    "throughput/mfu": "mfu {:.1%}",
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
        if is_interval(name):
            continue
        parts.append(f"{name.partition('/')[2]} {value:.3f}{_interval(name, scores)}")
    asked = "test" if any(name.startswith("test/") for name in scores) else "held-out"
    return f"{asked} at step {step} | " + " | ".join(parts)


def _interval(score: str, scores: Mapping[str, float]) -> str:
    low, high = (scores.get(score + end, math.nan) for end in (CI_LOW, CI_HIGH))
    return "" if math.isnan(low) or math.isnan(high) else f" ({low:.3f} to {high:.3f})"


_LABEL_WIDTH = 14
_ANSWER_CHARACTERS = 600
_SLOW = 10  # samples/s that are worth a decimal

_PHASES = {
    "time/wait_rollout_s": "waiting for rollouts",
    "time/forward_backward_s": "forward and backward",
    "time/optimizer_s": "optimizer",
    "time/weight_sync_s": "weight sync",
}
_ONCE_PER_ROLLOUT = ("time/wait_rollout_s", "time/weight_sync_s")


@dataclass
class Tally:
    """What a run has done so far.

    Attributes:
        seconds: Wall time of training.
        samples: Trajectories trained on.
        phases: Seconds by phase.
    """

    seconds: float = 0.0
    samples: int = 0
    phases: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        """Add time to a phase."""
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds


class RunSummary(Callback):
    """Prints what was resolved before the first step, and the result after the last one.

    Args:
        console: Where to print; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._run_folder = ""
        self._tally = Tally()
        self._started_s = self._validation_started_s = 0.0
        self._finished = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder: on all ranks, since Lightning broadcasts it; log the settings."""
        self._run_folder = str(run_folder(trainer))
        self._tally, self._finished = Tally(), False
        if stage == TrainerFn.FITTING and trainer.is_global_zero:
            settings = {
                "model": loggable(dict(pl_module.hparams)),
                "data": loggable(arguments_of(trainer.datamodule)),  # type: ignore[attr-defined]
            }
            # Before Lightning has loggers save what they know, some of them once and for all.
            for logger in trainer.loggers:
                logger.log_hyperparams(settings)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what was resolved."""
        self._started_s = time.monotonic()
        described = {"run": self._run_folder}
        for part in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
            if isinstance(part, Described):
                described |= part.describe()
        described |= no_validation_ahead(trainer)
        if trainer.is_global_zero:
            self._print(start_lines(described))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the validation."""
        self._validation_started_s = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the validation."""
        self._tally.add("validation", time.monotonic() - self._validation_started_s)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Count samples and seconds."""
        metrics = logged_numbers(trainer)
        for name, phase in _PHASES.items():
            if name in metrics and (batch.is_last or name not in _ONCE_PER_ROLLOUT):
                self._tally.add(phase, metrics[name])
        if batch.is_last and batch.rollout.groups is not None:
            self._tally.samples += sum(len(g.trajectories) for g in batch.rollout.groups)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._tally.seconds = time.monotonic() - self._started_s
        self._finished = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the result; only now are the last checkpoint and validation written."""
        if not (self._finished and trainer.is_global_zero):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        evaluations = data.evaluations if isinstance(data, Evaluated) else []
        self._print(end_lines(self._tally, evaluations, checkpoint_path(trainer), self._run_folder))

    def _print(self, lines: Iterator[str]) -> None:
        self._console.print("\n".join(lines), markup=False, soft_wrap=True)


def checkpoint_path(trainer: L.Trainer) -> str:
    """The checkpoint to go on with: the best, else the last; empty when none was saved."""
    for callback in trainer.checkpoint_callbacks:
        state = callback.state_dict()
        for name in ("best_model_path", "last_model_path"):
            if state.get(name):
                return str(state[name])
    return ""


def no_validation_ahead(trainer: L.Trainer) -> dict[str, str]:
    """Words for a run that ends before held-out prompts are answered again; else nothing.

    Args:
        trainer: At the start of training.
    """
    remaining, every = remaining_steps(trainer), trainer.val_check_batch
    if not trainer.enable_validation or remaining is None or not isinstance(every, int):
        return {}
    epoch, epochs = int(trainer.num_training_batches), trainer.check_val_every_n_epoch
    now, last = trainer.global_step, trainer.global_step + remaining
    for step in range(now + 1, last + 1):
        in_epoch = step if epochs is None else (step - 1) % epoch + 1
        if in_epoch % every == 0 and (epochs is None or -(-step // epoch) % epochs == 0):
            return {}
    answered = "before the first step only" if now == 0 else "not again"
    rule = f"every {every} steps" + (f" of an epoch of {epoch}" if epochs is not None else "")
    return {
        "held-out": f"answered {answered}: they would be {rule} (`val_check_interval`), and the "
        f"run ends at step {last}"
    }


def start_lines(described: Mapping[str, str]) -> Iterator[str]:
    """The summary before the first step."""
    yield ""
    for label, text in described.items():
        yield from _row(label, text)
    yield ""


def end_lines(
    tally: Tally, evaluations: Sequence[EvaluationRecord], checkpoint: str, run_folder: str
) -> Iterator[str]:
    """The summary after the last step."""
    yield ""
    yield from held_out_lines(evaluations)
    if tally.seconds > 0:
        training_s = max(tally.seconds - tally.phases.get("validation", 0.0), 1e-9)
        speed = f"{tally.samples} samples in {training_s:.0f} s without validation"
        per_s = tally.samples / training_s
        speed += f": {per_s:.2g} samples/s" if per_s < _SLOW else f": {per_s:,.0f} samples/s"
        yield from _row("speed", speed)
        yield from _row("time", phase_shares(tally))
    yield from _row("model", checkpoint or "not saved: no checkpoint was due (ModelCheckpoint)")
    commands = [f"lightning-grpo {what} {run_folder}" for what in ("report", "show")]
    if checkpoint:
        commands.insert(0, f"lightning-grpo export {checkpoint} {Path(run_folder) / 'model'}")
    for index, command in enumerate(commands):  # never wrapped: they are there to be copied
        yield f"{'' if index else 'next':<{_LABEL_WIDTH}}{command}"


def phase_shares(tally: Tally) -> str:
    """Where the time went, largest first; what no phase claims is `other`."""
    phases = dict(tally.phases)
    phases["other"] = max(0.0, tally.seconds - sum(phases.values()))
    largest = sorted(phases.items(), key=lambda item: -item[1])
    shares = [f"{name} {seconds / tally.seconds:.0%}" for name, seconds in largest]
    return ", ".join(share for share in shares if not share.endswith(" 0%"))


def held_out_lines(evaluations: Sequence[EvaluationRecord]) -> Iterator[str]:
    """Held-out scores before and after, and one problem answered before and after."""
    if not evaluations:
        yield from _row("held-out", "not measured: no validation ran")
        return
    first, last = evaluations[0], evaluations[-1]
    for name, after in last.metrics.items():
        if not is_interval(name):
            shown = f"{after:.3f}{_interval(name, last.metrics)}"
            steps = f"{last.step}"
            if first is not last:
                shown = f"{first.metrics.get(name, float('nan')):.3f} -> {shown}"
                steps = f"{first.step} -> {steps}"
            yield from _row("held-out", f"{shown} {name.partition('/')[2]}, step {steps}")
    pair = most_improved(first, last)
    if pair is not None and first is not last:
        yield from _answers(*pair)


def most_improved(first: EvaluationRecord, last: EvaluationRecord) -> tuple[Group, Group] | None:
    """The same held-out prompt in two validations, where its first answer gained the most."""
    pairs = []
    for name, groups in last.groups.items():
        before = {group.prompt.row: group for group in first.groups.get(name, ())}
        pairs += [(before[g.prompt.row], g) for g in groups if g.prompt.row in before]
    return max(pairs, key=_gain, default=None)


def _gain(pair: tuple[Group, Group]) -> float:
    before, after = pair
    return after.trajectories[0].reward - before.trajectories[0].reward


def _answers(before: Group, after: Group) -> Iterator[str]:
    messages = before.prompt.messages
    asked = str(messages[-1]["content"]) if messages else before.prompt.text
    yield from _row("problem", _short(asked))
    for label, group in (("before", before), ("after", after)):
        answer = group.trajectories[0]
        yield from _row(label, f"[reward {answer.reward:.3g}] {_short(answer.text)}")


def _short(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= _ANSWER_CHARACTERS else text[: _ANSWER_CHARACTERS - 4] + " ..."


def _row(label: str, text: str) -> Iterator[str]:
    """A label and its text, continued below itself."""
    lines = [
        part
        for line in text.splitlines() or [""]
        for part in textwrap.wrap(line, 100, break_on_hyphens=False, break_long_words=False) or [""]
    ]
    for index, line in enumerate(lines):
        yield f"{label if index == 0 else '':<{_LABEL_WIDTH}}{line}"
