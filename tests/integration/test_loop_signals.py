"""Ctrl-C, SIGTERM and impatience, in a real `lightning-grpo fit`."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from tests.fakes.ranks import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REWARD = """
def reward(completion):
    return float(sum(map(ord, completion)) % 2)
"""


def write_config(folder: Path, model: Path) -> None:
    rows = "".join(f'{{"question": "What is {i} + {i}?"}}\n' for i in range(50))
    (folder / "train.jsonl").write_text(rows)
    (folder / "mine.py").write_text(REWARD)
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 100_000},
        "model": {"model": str(model)},
        "data": {
            "prompts": {"path": "train.jsonl", "column": "question"},
            "workflow": {
                "class_path": "lightning_grpo.RLVRWorkflow",
                "init_args": {"reward": "mine.reward", "sampling": {"max_new_tokens": 6}},
            },
            "servers": "lightning_grpo.EmbeddedServers",
            "batch_size": 2,
            "group_size": 2,
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


class Fit:
    """`lightning-grpo fit` in a session of its own, with everything that it starts."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (folder / "out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightning_grpo.cli.main", "fit", "--config", "tiny.yaml",
                 *arguments],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.family: set[psutil.Process] = set()

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    @property
    def tail(self) -> str:
        return self.output[-1500:]

    def wait_for(self, text: str, timeout_s: float = 100.0) -> None:
        end = time.monotonic() + timeout_s
        while not re.search(text, self.output):
            assert time.monotonic() < end, self.tail
            assert self.process.poll() is None, self.tail
            time.sleep(0.05)
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def end(self, *signals: int, pause_s: float = 0.3) -> tuple[int, float]:
        """Send signals; exit status, and seconds since the last one."""
        for index, number in enumerate(signals):
            if index:
                time.sleep(pause_s)
            self.process.send_signal(number)
        sent = time.monotonic()
        status = self.process.wait(timeout=60)
        return status, time.monotonic() - sent

    def survivors(self, timeout_s: float = 10.0) -> list[psutil.Process]:
        """What it started and left behind; a moment is granted to the engine's supervisor."""
        _, alive = psutil.wait_procs(self.family, timeout=timeout_s)
        return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Fit]:
    fit = Fit(folder, *arguments)
    try:
        yield fit
    finally:
        if fit.process.poll() is None:
            os.killpg(fit.process.pid, signal.SIGKILL)
            fit.process.wait()
        for process in fit.survivors(timeout_s=5.0):
            process.kill()


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(tiny_model, tmp_path):
    write_config(tmp_path, tiny_model)
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


def test_sigterm_ends_alike_with_its_own_status(tiny_model, tmp_path):
    write_config(tmp_path, tiny_model)
    with started(tmp_path) as fit:
        fit.wait_for("step +2/")
        status, _ = fit.end(signal.SIGTERM)
        assert status == 143, fit.tail
        assert "SIGTERM: stopped at step" in fit.output
        assert "go on with: lightning-grpo fit --config tiny.yaml --ckpt_path runs/" in fit.output
        assert not fit.survivors()


def test_a_second_ctrl_c_ends_at_once_and_nothing_is_left(tiny_model, tmp_path):
    write_config(tmp_path, tiny_model)
    # A reward that never ends: the run waits for rollouts for good.
    (tmp_path / "mine.py").write_text("import time\ndef reward(completion):\n    time.sleep(999)\n")
    with started(tmp_path, "--data.limits.reward_timeout_s=900") as fit:
        fit.wait_for("staleness")  # the summary at the start: training has begun
        status, took_s = fit.end(signal.SIGINT, signal.SIGINT, pause_s=0.02)
        assert status == 130, fit.tail
        assert took_s < 10
        assert not fit.survivors()


def test_ctrl_c_while_servers_start_ends_the_run_and_them(tiny_model, tmp_path):
    write_config(tmp_path, tiny_model)
    with started(tmp_path) as fit:
        end = time.monotonic() + 50
        while not fit.family and time.monotonic() < end:
            fit.family |= set(psutil.Process(fit.process.pid).children(recursive=True))
            time.sleep(0.02)
        assert fit.family, fit.tail
        status, _ = fit.end(signal.SIGINT)
        assert status == 130, fit.tail
        assert not fit.survivors()
        assert "Traceback" not in fit.output


def test_a_killed_trainer_takes_its_servers_with_it(tiny_model, tmp_path):
    write_config(tmp_path, tiny_model)
    with started(tmp_path) as fit:
        fit.wait_for("step +2/")
        assert fit.family
        fit.end(signal.SIGKILL)
        assert not fit.survivors(timeout_s=15.0)
