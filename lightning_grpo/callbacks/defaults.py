"""The callbacks that every run gets unless the trainer already has one of the kind."""

from __future__ import annotations

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
    # Before the hooks that take long: until it has taken over, signals reach Lightning's handlers.
    SignalHandling,
    WeightSync,
    RunSummary,
    StepZeroValidation,
    HealthMonitor,
    TrajectoryWriter,
    FinalCheckpoint,
    GRPOProgress,
)
