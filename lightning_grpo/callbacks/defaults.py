"""The callbacks that every run gets unless the trainer already has one of the kind."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.baseline import StepZeroValidation
from lightning_grpo.callbacks.final_checkpoint import FinalCheckpoint
from lightning_grpo.callbacks.health import HealthMonitor
from lightning_grpo.callbacks.progress import GRPOProgress
from lightning_grpo.callbacks.signals import SignalHandling
from lightning_grpo.callbacks.summary import RunSummary
from lightning_grpo.callbacks.timing import StepTimer
from lightning_grpo.callbacks.trajectories import TrajectoryWriter
from lightning_grpo.callbacks.weight_sync import WeightSync

DEFAULT_CALLBACKS: tuple[type[Callback], ...] = (
    StepTimer,
    # Before the run may end behind a batch, which counts as trained on.
    TrajectoryWriter,
    # Before the hooks that take long: until it has taken over, signals reach Lightning's handlers.
    SignalHandling,
    WeightSync,
    RunSummary,
    StepZeroValidation,
    HealthMonitor,
    FinalCheckpoint,
    GRPOProgress,
)


def missing_callbacks(trainer: L.Trainer) -> list[Callback]:
    """One of each kind that the trainer has none of; no lines where its progress bar is off."""
    present = tuple(type(c) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return [
        kind()
        for kind in DEFAULT_CALLBACKS
        if not any(issubclass(p, kind) for p in present)
        and not (kind is GRPOProgress and trainer.progress_bar_callback is None)
    ]
