"""StepTimer: where the time of each step goes, and how fast tokens are trained on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import lightning as L
import psutil
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_grpo.datamodule import RolloutDataModule
    from lightning_grpo.loader import Minibatch


class StepTimer(Callback):
    """Logs `time/...`, `throughput/...`, `idle/...` and `health/...` of each step.

    The period of a step runs from the end of the step before to its own end, without validation;
    so it holds the weight sync of the step before.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find this process."""
        self._process = psutil.Process()
        self._period_started: float | None = None
        self._validation_s = self._validation_started = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on."""
        if trainer.state.fn == "fit":
            self._validation_s += time.perf_counter() - self._validation_started

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """The batch is there; the first period begins with the wait for it."""
        self._step_started = self._gradients_ready = time.perf_counter()
        if self._period_started is None:
            # The start of the servers and the baseline are no part of a step.
            waited = batch.rollout.metrics["time/wait_rollout_s"]
            self._period_started, self._validation_s = self._step_started - waited, 0.0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """The gradients are there."""
        self._gradients_ready = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Log the period that ends here."""
        assert self._period_started is not None
        now = time.perf_counter()
        period = now - self._period_started - self._validation_s
        logged = {
            "time/step_s": period,
            "time/forward_backward_s": self._gradients_ready - self._step_started,
            "time/optimizer_s": now - self._gradients_ready,
            "health/rss_gb": self._process.memory_info().rss / 2**30,
        }
        if batch.is_first:
            waited = batch.rollout.metrics["time/wait_rollout_s"]
            logged["idle/trainer_fraction"] = min(1.0, waited / period)
        tokens = int(batch.rollout.denominators[batch.index].tokens)
        logged["throughput/tokens_per_s"] = tokens / period
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        logged |= data.health()
        pl_module.log_dict(logged)
        self._period_started, self._validation_s = now, 0.0
