"""A real validation before the first step: without it no curve shows what training changed."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback


class StepZeroValidation(Callback):
    """Runs the validation loop once before the first optimizer step of a new run.

    It takes the place of Lightning's sanity check, which logs nothing. Resumed runs skip it.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate at step 0, after the servers have the weights."""
        unwanted = not trainer.enable_validation or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.global_step > 0 or unwanted:
            return
        trainer.validating = True
        pl_module.on_validation_model_zero_grad()
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
