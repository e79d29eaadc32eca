"""Ctrl-C, SIGTERM and impatience, in a real `lightning-grpo fit`."""

from __future__ import annotations

import re
import shlex
import signal

import pytest

from tests.fakes.fit_process import started, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


PLACES = pytest.mark.parametrize("where", ["thread", "process"])


@PLACES
def test_ctrl_c_saves_and_prints_the_command_that_goes_on(tiny_model, tmp_path, where):
    write_config(tmp_path, tiny_model, rollouts_in=where)
    with started(tmp_path) as fit:
        fit.wait_for("step +2/")
        status, _ = fit.end(signal.SIGINT)
        output = fit.output
        assert status == 130, fit.tail
        assert not fit.survivors()
    assert "Traceback" not in output
    step = int(re.search(r"SIGINT: stopped at step (\d+), saved (\S+\.ckpt)", output)[1])
    (command,) = re.findall(r"^go on with: lightning-grpo fit (.*)$", output, re.MULTILINE)
    assert shlex.split(command)[:2] == ["--config", "tiny.yaml"]
    with started(tmp_path, *shlex.split(command)[2:], f"--trainer.max_steps={step + 2}") as fit:
        assert fit.process.wait(timeout=60) == 0, fit.tail
        steps = re.findall(r"^step +(\d+)/", fit.output, re.MULTILINE)
    assert steps == [str(step + 1), str(step + 2)]


@PLACES
def test_sigterm_ends_alike_with_its_own_status(tiny_model, tmp_path, where):
    write_config(tmp_path, tiny_model, rollouts_in=where)
    with started(tmp_path) as fit:
        fit.wait_for("step +2/")
        for each in fit.those("session.child"):  # Slurm tells every process of a job
            each.terminate()
        status, _ = fit.end(signal.SIGTERM)
        assert status == 143, fit.tail
        assert "SIGTERM: stopped at step" in fit.output
        assert "go on with: lightning-grpo fit --config tiny.yaml --ckpt_path runs/" in fit.output
        assert not fit.survivors()


@PLACES
def test_a_second_ctrl_c_ends_at_once_and_nothing_is_left(tiny_model, tmp_path, where):
    write_config(tmp_path, tiny_model, rollouts_in=where)
    # A reward that never ends: the run waits for rollouts for good.
    (tmp_path / "mine.py").write_text("import time\ndef reward(completion):\n    time.sleep(999)\n")
    with started(tmp_path, "--data.limits.reward_timeout_s=900") as fit:
        fit.wait_for("staleness")  # the summary at the start: training has begun
        status, took_s = fit.end(signal.SIGINT, signal.SIGINT, pause_s=0.02)
        assert status == 130, fit.tail
        assert took_s < 10
        assert not fit.survivors()


TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp")


@pytest.mark.parametrize("ranks", [(), TWO_RANKS])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_servers_start_ends_the_run_and_them(
    tiny_model, tmp_path, ranks, number, status
):
    write_config(tmp_path, tiny_model)
    with started(tmp_path, *ranks) as fit:
        # An engine is starting; where there are two ranks, the second one is, too.
        fit.wait_for_child("lightning_grpo.engine")
        found, _ = fit.end(number)
        assert found == status, fit.tail
        assert not fit.survivors()
        assert "Traceback" not in fit.output


def test_sigterm_before_anything_is_loaded_ends_the_run(tiny_model, tmp_path):
    write_config(tmp_path, tiny_model)
    with started(tmp_path) as fit:
        fit.wait_until(lambda: fit.handles(signal.SIGTERM))
        status, _ = fit.end(signal.SIGTERM)
        assert status == 143, fit.tail
        assert fit.output == "stopped: SIGTERM outside of training: nothing was saved\n"


@PLACES
def test_a_killed_trainer_takes_its_servers_with_it(tiny_model, tmp_path, where):
    write_config(tmp_path, tiny_model, rollouts_in=where)
    with started(tmp_path) as fit:
        fit.wait_for("step +2/")
        assert fit.family
        fit.end(signal.SIGKILL)
        assert not fit.survivors(timeout_s=15.0)
