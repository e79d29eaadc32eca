"""`kill -9` of everything, again and again, at random moments of one run."""

from __future__ import annotations

import csv
import random
import time
from pathlib import Path

import pytest
import torch

from lightning_grpo.rollout.records import read_rows
from tests.fakes.fit_process import started, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = 10
BATCH, STEPS_PER_BATCH, ROWS = 4, 2, 50
SIZES = {"batch_size": BATCH, "minibatches_per_batch": STEPS_PER_BATCH, "max_staleness": 2}
SAVE_EVERY = [
    "--trainer.callbacks=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.save_top_k=3",
    "--trainer.callbacks.monitor=step",
    "--trainer.callbacks.mode=max",
    "--trainer.callbacks.save_last=link",
]


def readable(root: Path) -> list[int]:
    """Global steps of all checkpoints, each read as a whole."""
    found = [path for path in root.rglob("*.ckpt") if not path.is_symlink()]
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in found)


def curve(folder: Path) -> dict[int, float]:
    """The reward at every step, as the last start that reached it logged it."""
    parts = sorted(folder.glob("metrics-*.csv"), key=lambda p: int(p.stem.partition("-")[2]))
    rewards = {}
    for part in [*parts, folder / "metrics.csv"]:
        with part.open() as rows:
            logged = [row for row in csv.DictReader(rows) if row.get("reward/mean")]
        rewards |= {int(row["step"]): float(row["reward/mean"]) for row in logged}
    return rewards


def trained_keys(ledger: dict) -> int:
    """How many (pass, prompt) the ledger holds as trained; every pass has one entry a prompt."""
    for _, _, outcomes in ledger["open"]:
        assert outcomes.numel() == ROWS
    for _, _, counts in ledger["closed"]:
        assert sum(counts.values()) == ROWS
    return ledger["counts"]["trained"]


def test_a_run_that_is_killed_ten_times_trains_on_each_prompt_of_each_pass_once(
    tiny_model, tmp_path, capsys
):
    write_config(tmp_path, tiny_model, **SIZES)
    moments, root = random.Random(), tmp_path / "runs" / "tiny"
    reached = []
    for _ in range(KILLS):
        with started(tmp_path, "--ckpt_path=last-or-none", *SAVE_EVERY) as fit:
            fit.wait_for(r"step +\d+/")
            time.sleep(moments.uniform(0.0, 6.0))
            fit.kill_everything()
            assert not fit.survivors()
        reached.append(max(readable(root), default=0))
    steps = reached[-1] + 10
    arguments = ["--ckpt_path=last-or-none", f"--trainer.max_steps={steps}", *SAVE_EVERY]
    with started(tmp_path, *arguments) as fit:
        assert fit.process.wait(timeout=200) == 0, fit.tail
    (last,) = [p for p in root.rglob(f"*step={steps}.ckpt") if not p.is_symlink()]
    folder = last.parents[1]
    state = torch.load(last, weights_only=True)["RolloutDataModule"]
    rows = read_rows(folder)
    keys = {(row["pass_index"], row["row"]) for row in rows}
    groups = {(row["version"], row["group"]) for row in rows}
    rewards = curve(folder)
    with capsys.disabled():
        print(f"\ncheckpoint after each kill: {reached}; {steps} steps, {len(groups)} groups")
    assert state["version"] == steps // STEPS_PER_BATCH
    assert len(keys) == len(groups) == BATCH * state["version"]  # none twice
    assert trained_keys(state["producer"]["ledger"]) == len(keys)
    assert sorted(rewards) == list(range(1, steps + 1))
