"""Where the time of a training step goes: kernels by their cost, and how much of it the GPU works.

Used by `step.py --profile`; a callback, so that what is profiled is what a user runs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "wgmma"),
    "attention": ("flash", "fmha", "cudnn"),
    "optimizer and norms of gradients": ("multi_tensor", "fused_adam", "FusedOptimizer"),
    "copies": ("Memcpy", "copy", "Memset", "CatArray", "split_with_sizes", "chunk_cat"),
    "compiled": ("triton",),
    "norms": ("layer_norm", "LayerNorm", "rms"),
    "softmax": ("SoftMax", "softmax"),
    "indexing": ("index", "gather", "scatter", "Index"),
    "elementwise": ("elementwise",),
    "reductions": ("reduce", "Reduce"),
}


def kind_of(kernel: str) -> str:
    """Which part of the work a kernel belongs to, by its name."""
    for kind, words in KINDS.items():
        if any(word in kernel for word in words):
            return kind
    return "other"


def is_annotation(event: Any) -> bool:
    """A stretch that a program has named, which covers the kernels within it."""
    named = event.key.startswith(("Optimizer.", "FSDP::"))
    return named or bool(getattr(event, "is_user_annotation", False))


class ProfileStep(Callback):
    """Profiles one step.

    Args:
        out: Gets the shares as JSON; beside it, as `.txt`, the tables.
        step: Which, counted from 0.
    """

    def __init__(self, out: str, step: int = 6) -> None:
        self.out = Path(out)
        self.step = step
        self._profile: Any = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin, if it is the step."""
        if trainer.global_step == self.step:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.__enter__()
            self._began = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Write what was seen."""
        if self._profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        seen, self._profile = self._profile, None
        seen.__exit__(None, None, None)
        averages = seen.key_averages()
        kernels = [
            e
            for e in averages
            if e.self_device_time_total and not e.self_cpu_time_total and not is_annotation(e)
        ]
        shares: dict[str, float] = {}
        for each in kernels:
            kind = kind_of(each.key)
            shares[kind] = shares.get(kind, 0.0) + each.self_device_time_total / 1e6
        report = {
            "step_s": round(seconds, 4),
            "gpu_busy_s": round(sum(shares.values()), 4),
            "kernels": sum(each.count for each in kernels),
            "seconds": {k: round(v, 4) for k, v in sorted(shares.items(), key=lambda i: -i[1])},
        }
        self.out.write_text(json.dumps(report, indent=1) + "\n")
        rows = sorted(kernels, key=lambda e: -e.self_device_time_total)[:60]
        lines = [
            f"{e.self_device_time_total / 1e3:9.2f} ms {e.count:6d} {e.key[:150]}" for e in rows
        ]
        by_cpu = averages.table(
            sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60
        )
        self.out.with_suffix(".txt").write_text("\n".join(lines) + "\n\n" + by_cpu)
        print(json.dumps(report))
