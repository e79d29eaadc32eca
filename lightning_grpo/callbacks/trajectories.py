"""TrajectoryWriter: the trajectories that a run consumed, and its held-out answers, on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.views import Evaluated, MinibatchView, run_folder
from lightning_grpo.checks import require_count
from lightning_grpo.rollout.records import write_groups
from lightning_grpo.types import Group

log = logging.getLogger(__name__)

FOLDER = "trajectories"
HELD_OUT = "held_out"


class TrajectoryWriter(Callback):
    """Writes every consumed rollout batch to `trajectories/step_000012.parquet` of the run.

    Held-out answers go to `trajectories/held_out/step_000012.parquet`, all sets in one file. Read
    either with `lightning-grpo show`, train from the former with `lightning-grpo replay`. A file
    that can't be written (a full disk) is left out, and the run goes on.

    Args:
        folder: Where to write; None is the run's folder (the first logger's).
        every_n_batches: Write every n-th rollout batch only.
    """

    def __init__(self, folder: str | None = None, every_n_batches: int = 1) -> None:
        require_count("every_n_batches", every_n_batches)
        self._folder = folder
        self._every_n_batches = every_n_batches
        self._run_folder = Path()
        self._failed = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder: on all ranks, since Lightning broadcasts it."""
        self._run_folder = Path(self._folder or run_folder(trainer) / FOLDER)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MinibatchView,
        batch_idx: int,
    ) -> None:
        """Write the rollout batch after its last optimizer step."""
        rollout = batch.rollout
        if not batch.is_last or rollout.groups is None or rollout.index % self._every_n_batches:
            return
        path = self._run_folder / f"step_{trainer.global_step:06d}.parquet"
        self._write(path, rollout.groups, step=trainer.global_step, version=rollout.version)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the held-out answers of the validation that has just ended (rank 0 has them)."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        last = data.evaluations[-1:] if isinstance(data, Evaluated) else []
        for record in last:
            groups = [group for answered in record.groups.values() for group in answered]
            if groups:
                path = self._run_folder / HELD_OUT / f"step_{record.step:06d}.parquet"
                version = max(group.oldest_version for group in groups)
                self._write(path, groups, step=record.step, version=version, outcome="held out")

    def _write(self, path: Path, groups: Sequence[Group], **about: Any) -> None:
        """Write a file, or say why not: once, until one is written again."""
        try:
            write_groups(path, groups, **about)
        except OSError as error:
            if not self._failed:
                why = error.strerror or error
                log.warning("%s can't be written (%s): the run goes on without it", path, why)
            self._failed = True
            return
        if self._failed:
            log.warning("trajectories are written again, from %s on", path)
        self._failed = False

    on_test_end = on_validation_end
