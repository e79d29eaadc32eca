"""What the reporting callbacks may read, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
from typing_extensions import Protocol, runtime_checkable

from lightning_grpo.session.session import Session
from lightning_grpo.types import RolloutProgress
from lightning_grpo.validation import EvaluationRecord


@runtime_checkable
class Rolling(Protocol):
    """A data module that knows how far its rollouts are."""

    def progress(self) -> RolloutProgress | None:
        """How far the next rollout batch is."""
        ...


@runtime_checkable
class Asking(Protocol):
    """A loader of held-out prompts that knows how much it asks for."""

    num_answers: int


@runtime_checkable
class Described(Protocol):
    """A module or data module that says what it resolved."""

    def describe(self) -> Mapping[str, str]:
        """Label -> one line."""
        ...


@runtime_checkable
class Evaluated(Protocol):
    """A data module that keeps its validations."""

    evaluations: Sequence[EvaluationRecord]


@runtime_checkable
class OnRollouts(Protocol):
    """A data module whose batches come from a session of rollouts."""

    session: Session | None


@runtime_checkable
class InFolder(Protocol):
    """A data module that knows the run's folder."""

    run_dir: Path | None


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run's files go; called on all ranks, since Lightning broadcasts it."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, InFolder) and data.run_dir is not None:
        return data.run_dir
    return Path(trainer.log_dir or trainer.default_root_dir)


def evaluated_step(trainer: L.Trainer) -> int:
    """Optimizer steps before the validation that has just ended, of a checkpoint's run too."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    evaluations = data.evaluations if isinstance(data, Evaluated) else []
    return evaluations[-1].step if evaluations else trainer.global_step


def logged_numbers(trainer: L.Trainer) -> dict[str, float]:
    """What was logged last, as plain numbers by name."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
