"""Where the time of a step goes, and how much of its GPU a rank uses."""

from __future__ import annotations

import time
from dataclasses import replace

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lightning_grpo._compat_lightning import log_values
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.loader import Minibatch
from lightning_grpo.policy.packed import PackedPolicy

Mark = float | torch.cuda.Event


class StepTimer(Callback):
    """Logs `time/...`, `throughput/...`, `idle/...` and `health/...` of each step.

    The period of a step runs from the end of the step before to its own end, without validation;
    so it holds the weight sync of the step before. On a GPU, which still works on the optimizer
    then, `time/optimizer_s` is that of the step before: to wait for it would cost the next step its
    head start.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find this process."""
        self._process = psutil.Process()
        # The module itself is moved to its device only later.
        device = trainer.strategy.root_device
        self._peak = matrix_peak(device) if stage == "fit" else None
        self._period_started: float | None = None
        self._optimizer: tuple[Mark, Mark] | None = None
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
        self._step_started = self._gradients_ready = self._mark()
        if self._period_started is None:
            # The start of the servers and the baseline are no part of a step.
            waited = batch.rollout.metrics["time/wait_rollout_s"]
            self._period_started, self._validation_s = time.perf_counter() - waited, 0.0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """The gradients are there, or will be when the GPU comes to it."""
        self._gradients_ready = self._mark()

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
        now, optimizer = time.perf_counter(), (self._gradients_ready, self._mark())
        if self._optimizer is None or self._peak is None:  # else that of the step before
            self._optimizer = optimizer
        period = now - self._period_started - self._validation_s
        logged = {
            "time/step_s": period,
            "time/forward_backward_s": seconds(self._step_started, self._gradients_ready),
            "time/optimizer_s": seconds(*self._optimizer),
            "health/rss_gb": self._process.memory_info().rss / 2**30,
        }
        if batch.is_first:
            waited = batch.rollout.metrics["time/wait_rollout_s"]
            logged["idle/trainer_fraction"] = min(1.0, waited / period)
        tokens = int(batch.rollout.denominators[batch.index].tokens)
        logged["throughput/tokens_per_s"] = tokens / period
        if self._peak is not None:
            logged["throughput/mfu"] = self._flops(pl_module, batch) / period / self._peak
            logged["health/gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        logged |= data.health()
        log_values(pl_module, logged)
        self._period_started, self._validation_s, self._optimizer = now, 0.0, optimizer

    def _mark(self) -> Mark:
        """This moment; on a GPU the one at which it will have done what it was given so far."""
        if self._peak is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _flops(self, module: L.LightningModule, batch: Minibatch) -> float:
        rollout = batch.rollout
        rows = [row for part in rollout.plans[batch.index] for row in part]
        share = replace(rollout.sequences, routes=None).select(rows)
        policy: PackedPolicy = module.sharding_root()  # type: ignore[operator]
        return policy.flops(share.lengths.tolist(), int(share.loss_mask.sum()))


def seconds(start: Mark, end: Mark) -> float:
    """From one mark to another; waits for the GPU to come to the second."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start


def matrix_peak(device: torch.device) -> float | None:
    """FLOP/s of a product of two bf16 matrices of 8,192 rows on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    rows, times = 8192, 10
    left, right = (torch.randn(rows, rows, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        left @ right
    end.record()
    end.synchronize()
    del left, right
    torch.cuda.empty_cache()  # servers that start beside look at what is free
    return times * 2 * rows**3 / (begin.elapsed_time(end) / 1e3)
