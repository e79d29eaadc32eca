"""RunSummary: what is about to run, and what came of it."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from lightning_grpo.callbacks.views import (
    Described,
    Evaluated,
    EvaluationView,
    MinibatchView,
    logged_numbers,
    run_folder,
)
from lightning_grpo.contract import remaining_steps
from lightning_grpo.hparams import arguments_of, loggable
from lightning_grpo.types import Group

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
        batch: MinibatchView,
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
    tally: Tally, evaluations: Sequence[EvaluationView], checkpoint: str, run_folder: str
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
    commands = [f"lightning-grpo show {run_folder}"]
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


def held_out_lines(evaluations: Sequence[EvaluationView]) -> Iterator[str]:
    """Held-out scores before and after, and one problem answered before and after."""
    if not evaluations:
        yield from _row("held-out", "not measured: no validation ran")
        return
    first, last = evaluations[0], evaluations[-1]
    for name, after in last.metrics.items():
        if not name.endswith("_ci95"):
            interval = last.metrics.get(f"{name}_ci95", float("nan"))
            shown = f"{after:.3f}" + (f" (+- {interval:.3f})" if interval == interval else "")
            steps = f"{last.step}"
            if first is not last:
                shown = f"{first.metrics.get(name, float('nan')):.3f} -> {shown}"
                steps = f"{first.step} -> {steps}"
            yield from _row("held-out", f"{shown} {name.partition('/')[2]}, step {steps}")
    pair = most_improved(first, last)
    if pair is not None and first is not last:
        yield from _answers(*pair)


def most_improved(first: EvaluationView, last: EvaluationView) -> tuple[Group, Group] | None:
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
    text = " ".join(text.split())
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
