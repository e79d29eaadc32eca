"""Where the time of a training step goes: kernels by cost, the GPU's share, the host's waits.

Used by `step.py --profile`; callbacks, so that what is profiled is what a user runs.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType
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

DEPTH = 12


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


def stack_of(frame: FrameType | None) -> list[str]:
    """Where a thread is, innermost first."""
    places: list[str] = []
    while frame is not None and len(places) < DEPTH:
        code = frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return places


class IdleGPU(Callback):
    """Where the host is while the GPU has nothing to do, by looking a thousand times a second.

    Args:
        out: Gets the share of samples at which all launched work was done, the steps' seconds, and
            the places where the main thread was then, the most frequent first.
        first: The first step that is looked at, counted from 0.
    """

    def __init__(self, out: str, first: int = 8) -> None:
        self.out = Path(out)
        self.first = first
        self._steps: list[float] = []
        self._idle: Counter[tuple[str, ...]] = Counter()
        self._samples = 0
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to look, if it is the step."""
        if trainer.global_step < self.first:
            return
        self._steps.append(time.perf_counter())
        if self._thread is None:
            arguments = (torch.cuda.current_stream(), threading.get_ident())
            self._thread = threading.Thread(target=self._look, args=arguments, daemon=True)
            self._thread.start()

    def _look(self, stream: torch.cuda.Stream, main: int) -> None:
        while not self._ended.wait(0.001):
            self._samples += 1
            if not stream.query():
                continue
            frames = sys._current_frames()
            places = stack_of(frames.pop(main))
            if places and "run_backward" in places[0]:  # autograd works in a thread of its own
                others = [stack_of(f) for i, f in frames.items() if i != threading.get_ident()]
                working = [each for each in others if "autograd" in " ".join(each)]
                places = [*(working[0] if working else []), *places]
            self._idle[tuple(places)] += 1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what was seen."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        idle = sum(self._idle.values())
        report = {
            "steps_s": [round(b - a, 4) for a, b in pairwise(self._steps)],
            "samples": self._samples,
            "idle_share": round(idle / max(1, self._samples), 4),
            "places": [
                {"share": round(n / max(1, self._samples), 4), "stack": list(places)}
                for places, n in self._idle.most_common(60)
            ],
        }
        self.out.write_text(json.dumps(report, indent=1) + "\n")
