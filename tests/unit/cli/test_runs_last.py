"""Which checkpoint `--ckpt_path last` means."""

from __future__ import annotations

import os

from lightning_grpo.cli.runs import last_checkpoint, version_of


def make(path, age_s):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (10_000 - age_s, 10_000 - age_s))
    return path


def test_the_checkpoint_of_a_stopped_run_counts_when_it_is_the_newest(tmp_path):
    make(tmp_path / "version_0/checkpoints/epoch=0-step=20.ckpt", age_s=5)
    make(tmp_path / "version_1/checkpoints/epoch=0-step=10.ckpt", age_s=3)
    stopped = make(tmp_path / "hpc_ckpt_1.ckpt", age_s=1)
    assert last_checkpoint(tmp_path) == stopped
    assert version_of(stopped) == 1


def test_an_older_stop_does_not_hide_a_newer_checkpoint(tmp_path):
    make(tmp_path / "hpc_ckpt_1.ckpt", age_s=9)
    newest = make(tmp_path / "version_2/checkpoints/final-step=40.ckpt", age_s=1)
    assert last_checkpoint(tmp_path) == newest
    assert version_of(newest) == 2
