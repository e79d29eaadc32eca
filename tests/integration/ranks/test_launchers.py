"""Ranks that Lightning starts in its other ways: forked, as in a notebook, or spawned."""

from __future__ import annotations

import pytest

from tests.fakes.fit_process import started, write_config


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_ranks_that_are_forked_or_spawned_train(tiny_model, tmp_path, strategy):
    write_config(tmp_path, tiny_model)
    arguments = (f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.max_steps=2")
    with started(tmp_path, *arguments) as run:
        assert run.process.wait(150) == 0, run.tail
        assert "step 2/2" in run.output
