"""Ranks that Lightning forks, as in a notebook, or spawns, from a program of the user's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fakes.ranks import ROOT

PROGRAM = """
import sys
from pathlib import Path
from lightning_grpo import EmbeddedServers
from tests.fakes.loops import make_data, make_module, make_trainer

if __name__ == "__main__":
    model, folder, strategy = sys.argv[1:]
    trainer = make_trainer(Path(folder), strategy=strategy, devices=2, max_steps=2)
    trainer.fit(make_module(model), make_data(EmbeddedServers()))
    print("status", trainer.state.status)
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_ranks_that_are_forked_or_spawned_train(tiny_model, tmp_path, strategy):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(tiny_model), str(tmp_path), strategy]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "FINISHED" in run.stdout
    assert "`max_steps=2` reached" in run.stderr
