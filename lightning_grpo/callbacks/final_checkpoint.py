"""FinalCheckpoint: the last steps are kept, also where no checkpoint was due after them."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_grpo._compat import last_saved_step


class FinalCheckpoint(Callback):
    """Saves at the end of training what no `ModelCheckpoint` has saved.

    With validation inside an epoch Lightning saves after validations alone, so that the steps
    after the last one would be lost. It does nothing where the trainer has no checkpoints.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save beside the other checkpoints, unless one has this step already."""
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if not kept or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(last_saved_step(callback) == trainer.global_step for callback in kept):
            return
        folder = trainer.strategy.broadcast(kept[0].dirpath or trainer.default_root_dir)
        path = str(Path(folder) / f"final-step={trainer.global_step}.ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        if kept[0].monitor is None:
            # Without a metric the newest is the one to go on with.
            kept[0].best_model_path = path
