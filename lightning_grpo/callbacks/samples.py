"""Answers of the policy beside the curve, in loggers that take tables or text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.curve import going_on_without, mlflow_name
from lightning_grpo.contract import Evaluated
from lightning_grpo.errors import require_count
from lightning_grpo.loader import Minibatch
from lightning_grpo.types import Group

COLUMNS = ("prompt", "completion", "reward", "truncated")
Row = tuple[str, str, float, bool]


class SampleTables(Callback):
    """Logs answers to held-out prompts, the same prompts each time, and some sampled in training.

    A logger with `log_table` (W&B) gets a table, one whose experiment has `add_text` (TensorBoard)
    or `log_text` (MLflow) gets text. Others get nothing.

    Args:
        rows: Answers each time.
        every_n_batches: Log sampled answers of every n-th rollout batch.
    """

    def __init__(self, rows: int = 10, every_n_batches: int = 20) -> None:
        require_count("rows", rows)
        require_count("every_n_batches", every_n_batches)
        self.rows = rows
        self.every_n_batches = every_n_batches

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Log what was sampled, one answer of each of the first groups."""
        rollout = batch.rollout
        due = batch.is_last and rollout.index % self.every_n_batches == 0
        if due and rollout.groups is not None:
            self._log(trainer, "sampled", rollout.groups, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log answers of the validation that has just ended (rank 0 has them)."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        for record in data.evaluations[-1:] if isinstance(data, Evaluated) else ():
            for name, groups in record.groups.items():
                key = f"held_out/{name}" if name else "held_out"
                self._log(trainer, key, groups, record.step)

    on_test_end = on_validation_end

    def _log(self, trainer: L.Trainer, key: str, groups: Sequence[Group], step: int) -> None:
        rows = [row_of(group) for group in groups[: self.rows]]
        for logger in trainer.loggers if rows else ():
            with going_on_without(f"answers in {type(logger).__name__}"):
                send(logger, key, rows, step)


def row_of(group: Group) -> Row:
    """The first answer to a prompt."""
    first = group.trajectories[0]
    return group.prompt.text, first.transcript or first.text, first.reward, first.truncated


def send(logger: Any, key: str, rows: Sequence[Row], step: int) -> None:
    """Give a logger answers in a form that it takes, if there is one."""
    if hasattr(logger, "log_table"):
        logger.log_table(key, columns=list(COLUMNS), data=[list(row) for row in rows], step=step)
        return
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):
        experiment.add_text(key, "\n\n".join(as_markdown(rows)), step)
    elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):
        text = "\n\n".join(as_markdown(rows))
        experiment.log_text(logger.run_id, text, f"{mlflow_name(key)}/step_{step:06d}.md")


def as_markdown(rows: Iterable[Row]) -> Iterable[str]:
    """A heading and the text of each; indented, so that markup in it shows as it is."""
    for prompt, completion, reward, truncated in rows:
        yield f"**reward {reward:g}**" + (", cut off" if truncated else "")
        yield "\n".join(f"    {line}" for line in (prompt + completion).splitlines())
