"""Runs on a real Ray cluster with two nodes, which this machine plays: `make test-ray`."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes.ranks import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SMALL = ["--data.val_prompts.limit", "8", "--data.batch_size", "4", "--data.group_size", "4"]
SAVE = [
    "--trainer.callbacks=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.save_last=link",
]


class Job:
    """`lightning-grpo launch ray` under way."""

    def __init__(self, folder: Path, address: str, *options: str) -> None:
        self.folder, self.run = folder, folder / "runs" / "quickstart"
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lightning_grpo.cli.main", "launch", "ray"]
        with (folder / "out").open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--config", "quickstart.yaml", "--address", address, *options],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = 200.0) -> re.Match[str]:
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < end, self.output[-4000:]
            assert self.process.poll() is None, self.output[-4000:]
            time.sleep(0.2)
        return found

    def end(self, timeout_s: float = 300.0) -> int:
        status = self.process.wait(timeout=timeout_s)
        assert not self.processes("cli.main"), "something stays on a node"
        return status

    def processes(self, *words: str) -> list[psutil.Process]:
        """What runs on the nodes for this job and has these words in its command line."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            line = " ".join(process.info["cmdline"] or ())
            ours = process.info["cwd"] == str(self.folder) and process.pid != self.process.pid
            if ours and "supervisor.py" not in line and all(word in line for word in words):
                found.append(process)
        return found

    def steps(self) -> list[int]:
        """Every step that some start of the job logged a loss of."""
        found = set()
        for file in self.run.glob("version_*/metrics*.csv"):
            with file.open() as rows:
                found |= {int(r["step"]) for r in csv.DictReader(rows) if r.get("policy/loss")}
        return sorted(found)


@pytest.fixture
def launch(cluster, tmp_path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def start(*options: str) -> Job:
        jobs.append(Job(tmp_path, cluster.address, *SMALL, *options))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def test_a_run_with_its_server_on_the_other_node_outlives_a_killed_server(launch):
    job = launch("--trainer.max_steps", "8")
    job.wait_for(r"servers +http://\S+")
    job.wait_for(r"step +2/8")
    (engine,) = job.processes("lightning_grpo.engine")
    engine.kill()
    assert job.end() == 0, job.output[-4000:]
    assert re.search(r"step +8/8 \| reward \d\.\d+", job.output)
    assert job.steps() == list(range(1, 9))
    logs = {file.name: file.read_text() for file in (job.run / "logs").iterdir()}
    assert logs.keys() == {"train-0.0.log", "server-0.0.log"}
    assert "step   8/8" in logs["train-0.0.log"] or re.search(r"step +8/8", logs["train-0.0.log"])
    assert "server 0 is out, and started again" in job.output


def test_a_killed_trainer_goes_on_from_its_last_checkpoint(launch):
    job = launch("--trainer.max_steps", "10", "--max-restarts", "1", *SAVE)
    job.wait_for(r"step +5/10")
    (trainer,) = job.processes("cli.main", " fit ")
    trainer.kill()
    job.wait_for("restart 1 of 1")
    assert "train-0 ended with status 137" in job.output
    assert job.end() == 0, job.output[-4000:]
    again = job.output.partition("restart 1 of 1")[2]
    assert re.search(r"Restoring states from the checkpoint path at \S+\.ckpt", again)
    assert not re.search(r"step +1/10", again)
    assert job.steps() == list(range(1, 11))


def test_ranks_on_two_nodes_train_together_and_one_that_is_killed_ends_the_run(launch):
    job = launch(
        *("--train-nodes", "2", "--server-nodes", "0"),
        *("--trainer.strategy", "fsdp2", "--trainer.max_steps", "10000"),
    )
    job.wait_for(r"step +2/10000")
    second = [p for p in job.processes(" fit ") if p.environ().get("NODE_RANK") == "1"]
    second[0].kill()
    assert job.end() not in (0, 2)
    assert "train-1 ended with status 137" in job.output or "rank 1 failed" in job.output


def test_a_lost_machine_is_named_and_another_one_takes_its_place(launch, cluster):
    job = launch("--trainer.max_steps", "10", "--max-restarts", "1", *SAVE)
    job.wait_for(r"step +4/10")
    cluster.kill(1)  # Ray has put the trainer there, or the server
    job.wait_for("(server|train)-0 was lost: ")
    cluster.add(f"--address={cluster.address}")
    assert job.end() == 0, job.output[-4000:]
    assert "restart 1 of 1" in job.output
    assert job.steps() == list(range(1, 11))


def test_ctrl_c_saves_and_ends_everything(launch):
    job = launch("--trainer.max_steps", "10000")
    job.wait_for(r"step +2/10000")
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 130, job.output[-4000:]
    assert re.search(r"SIGINT: stopped at step \d+, saved \S+hpc_ckpt_1\.ckpt", job.output)
    assert (job.run / "hpc_ckpt_1.ckpt").exists()


def test_a_cluster_without_room_and_a_mistake_in_the_config_are_told_once(launch):
    crowded = launch("--train-nodes", "3", "--wait", "2")
    assert crowded.end() == 2
    assert "the cluster must have 4 nodes" in crowded.output
    assert crowded.output.count(": 2 CPUs, 0 GPUs") == 2
    mistaken = launch("--data.group_size", "1", "--max-restarts", "3")
    assert mistaken.end() == 2
    assert "`group_size` must be >= 2" in mistaken.output
    assert "restart" not in mistaken.output
