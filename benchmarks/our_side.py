"""The quickstart's task with this package, timed step by step, for `vs_trl.py`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_grpo import (
    EmbeddedServers,
    GRPOLoss,
    GRPOModule,
    Prompts,
    RLVRWorkflow,
    RolloutDataModule,
    Sampling,
)
from lightning_grpo.rewards import gsm8k

SAVED_AFTER = (10, 20, 30)
PHASES = ("wait_rollout_s", "forward_backward_s", "optimizer_s", "weight_sync_s")


class Clock(L.Callback):
    """Takes the time of each step, saving included in none."""

    def __init__(self, out: Path) -> None:
        self.out, self.ends, self.models = out, [], {}
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.saving_s = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """One more step."""
        now = time.perf_counter()
        self.ends.append(now - self.saving_s)
        if trainer.global_step in SAVED_AFTER:
            self.models[trainer.global_step] = str(
                pl_module.export(self.out / f"model-{trainer.global_step}")
            )
            self.saving_s += time.perf_counter() - now
        for phase in PHASES:
            self.phases[phase] += float(trainer.callback_metrics.get(f"time/{phase}", 0.0))


def main() -> None:
    """Train and write `result.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    L.seed_everything(args.seed)
    clock = Clock(args.out)
    data = RolloutDataModule(
        prompts=Prompts("shipped:quickstart/train.jsonl", column="question", seed=args.seed),
        workflow=RLVRWorkflow(gsm8k, Sampling(max_new_tokens=56)),
        servers=EmbeddedServers(),
        batch_size=16,
        group_size=8,
        max_staleness=1,
    )
    module = GRPOModule(
        "shipped:quickstart",
        loss=GRPOLoss(clip_low=0.2, clip_high=0.28),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=args.out,
        callbacks=[clock],
    )
    trainer.fit(module, data)
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    (args.out / "result.json").write_text(
        json.dumps(
            {
                "step_seconds": seconds,
                "samples_per_step": 128,
                "models": clock.models,
                "phases": clock.phases,
            }
        )
    )


if __name__ == "__main__":
    main()
