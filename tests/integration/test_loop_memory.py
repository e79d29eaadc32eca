"""Memory is flat over many steps, in the trainer and in the engine."""

from __future__ import annotations

import gc

import psutil
import pytest
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.curve import CurveLogger
from lightning_grpo.callbacks.recording import TrajectoryWriter
from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.types import Sampling
from tests.fakes.loops import make_data, make_module, make_prompts, make_trainer

WARM_UP, STEPS, EVERY = 60, 260, 20
MOST_GROWTH_MB = 12.0
LONG, LATE = 10_000, 6_000
MOST_LONG_GROWTH_MB = 25.0
"""Allocators take some megabytes at a time: one such step may come late, a slope would not end."""


class Memory(Callback):
    """Resident megabytes of this process and of the engine, now and then."""

    def __init__(self, engine_pid: int, warm_up: int = WARM_UP, every: int = EVERY) -> None:
        self.warm_up, self.every = warm_up, every
        self.processes = (psutil.Process(), psutil.Process(engine_pid))
        self.readings: list[tuple[float, ...]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step >= self.warm_up and trainer.global_step % self.every == 0:
            gc.collect()
            self.readings.append(tuple(p.memory_info().rss / 2**20 for p in self.processes))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_is_flat_over_two_hundred_steps(tiny_model, loop_engine, tmp_path):
    memory = Memory(loop_engine.pid)
    data = make_data(
        loop_engine.url,
        prompts=make_prompts(30),
        batch_size=4,
        group_size=4,
        max_staleness=1,
        sampling=Sampling(max_new_tokens=16),
    )
    trainer = make_trainer(tmp_path, max_steps=STEPS, callbacks=[memory])
    trainer.fit(make_module(tiny_model), data)
    for name, values in zip(("trainer", "engine"), zip(*memory.readings, strict=True), strict=True):
        print(f"{name}: {values[0]:.1f} MB at step {WARM_UP}, {values[-1]:.1f} MB at step {STEPS}")
        assert values[-1] - values[0] < MOST_GROWTH_MB, (name, values)


class LateMetric(Callback):
    """Logs a metric that the curve's file has had no column for."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == LATE:
            pl_module.log("late/metric", 1.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_bounded_over_ten_thousand_steps_with_files_and_a_late_column(
    tiny_model, loop_engine, tmp_path
):
    memory = Memory(loop_engine.pid, warm_up=1000, every=250)
    data = make_data(
        loop_engine.url, prompts=make_prompts(30), max_staleness=1, sampling=Sampling(4)
    )
    trainer = make_trainer(
        tmp_path,
        max_steps=LONG,
        logger=CurveLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1),
        callbacks=[memory, LateMetric(), TrajectoryWriter(), WeightSync(verify=False)],
    )
    trainer.fit(make_module(tiny_model), data)
    for name, values in zip(("trainer", "engine"), zip(*memory.readings, strict=True), strict=True):
        print(f"{name}: {' '.join(f'{value:.0f}' for value in values)} MB")
        half = len(values) // 2
        assert max(values[half:]) - max(values[:half]) < MOST_LONG_GROWTH_MB, (name, values)
