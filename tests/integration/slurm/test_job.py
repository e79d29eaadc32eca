"""Jobs of a real Slurm with two nodes (`start.sh` makes one of this machine): `make test-slurm`."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_grpo.rollout.records import recorded_version, trajectory_files

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm: run start.sh"),
]
ROOT = Path(__file__).parents[3]
SMALL = ["--data.val_prompts.limit", "8", "--data.batch_size", "4", "--data.group_size", "4"]


class Job:
    """A submitted job."""

    def __init__(self, folder: Path, number: str) -> None:
        self.number = number
        self.run = folder / "runs" / f"quickstart-{number}"
        self._log = folder / "runs" / f"slurm-{number}.out"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def state(self) -> str:
        shown = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True
        )
        return re.search(r"JobState=(\w+)", shown.stdout)[1]

    def wait(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, self.log[-4000:]
            time.sleep(0.5)

    def wait_for_end(self) -> None:
        self.wait(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"))
        assert self.state == "COMPLETED", self.log[-4000:]

    def steps(self) -> list[int]:
        """Every step that some start of the job logged a loss of."""
        found = []
        for file in self.run.glob("version_*/metrics.csv"):
            with file.open() as rows:
                found += [int(r["step"]) for r in csv.DictReader(rows) if r.get("policy/loss")]
        return sorted(found)


def launch(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lightning_grpo.cli.main", "launch", "slurm"]
    return subprocess.run(
        [*command, "--config", "quickstart.yaml", "--time", "30:00", "--submit", *options],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def submit(tmp_path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def start(*options: str) -> Job:
        done = launch(tmp_path, *SMALL, *options)
        assert done.returncode == 0, done.stderr
        jobs.append(Job(tmp_path, re.search(r"submitted job (\d+)", done.stdout)[1]))
        return jobs[-1]

    yield start
    for job in jobs:
        subprocess.run(["scancel", job.number], check=False)
        job.wait(lambda job=job: job.state not in ("RUNNING", "COMPLETING", "PENDING"))


def test_a_job_with_its_servers_on_another_node_is_requeued_and_goes_on_where_it_stopped(submit):
    job = submit("--trainer.max_steps", "30")
    job.wait(lambda: "step  3/30" in job.log)
    assert "servers       http://n2:" in job.log
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)
    job.wait(lambda: job.state == "PENDING")
    assert (job.run / "hpc_ckpt_1.ckpt").exists()
    # Slurm itself would wait two minutes before it starts a requeued job.
    subprocess.run(["scontrol", "update", f"JobId={job.number}", "StartTime=now"], check=True)
    job.wait_for_end()
    stopped = int(re.search(r"SIGUSR1: stopped at step (\d+)", job.log)[1])
    assert 3 <= stopped < 30
    assert job.steps() == list(range(1, 31))
    versions = [
        recorded_version(file)
        for folder in sorted(job.run.glob("version_*"))
        for file in trajectory_files(folder)
    ]
    assert versions == list(range(30))
    assert "Traceback" not in job.log.split(f"step {stopped + 1:>2}/30")[1]


def test_ranks_on_two_nodes_train_together_and_the_first_serves(submit):
    job = submit(
        *("--train-nodes", "2", "--server-nodes", "0"),
        *("--trainer.strategy", "fsdp2", "--trainer.max_steps", "3"),
    )
    job.wait_for_end()
    assert "[rank: 1] Seed set to 0" in job.log
    assert job.steps() == [1, 2, 3]


def test_four_ranks_on_two_nodes_shard_within_each(submit):
    strategy = ("--trainer.strategy", "lightning_grpo.FSDP2Strategy")
    job = submit(
        *("--train-nodes", "2", "--server-nodes", "0", "--ranks-per-node", "2"),
        *(*strategy, "--trainer.strategy.shard_size", "2", "--trainer.max_steps", "3"),
    )
    job.wait_for_end()
    assert "[rank: 3] Seed set to 0" in job.log
    assert job.steps() == [1, 2, 3]


@pytest.mark.parametrize("options", [("--partition", "none"), ("--qos", "none", "--mem", "1E")])
def test_a_job_that_slurm_refuses_is_told_in_its_own_words(tmp_path, options):
    done = launch(tmp_path, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Slurm refused the job: sbatch: error: ")
    assert len(done.stderr.splitlines()) == 1


def test_ranks_and_servers_have_the_cores_of_their_nodes(tmp_path):
    program = tmp_path / "program"
    program.write_text(
        "#!/bin/bash\n"
        'echo "$1 $SLURM_STEP_NUM_TASKS x $SLURM_CPUS_PER_TASK of $SLURM_CPUS_ON_NODE"\n'
    )
    program.chmod(0o755)
    done = launch(
        *(tmp_path, "--program", str(program), "--ranks-per-node", "2", "--setup", "echo $NOT_SET"),
        *("--partition", "main", "--", "--exclusive"),
    )
    number = re.search(r"submitted job (\d+)", done.stdout)[1]
    job = Job(tmp_path, number)
    job.wait(lambda: {"fit 2 x 1 of 2", "launch 1 x 2 of 2"} <= set(job.log.splitlines()))
    job.wait_for_end()


def test_doctor_sees_one_folder_from_all_nodes_and_ranks_that_reach_each_other(tmp_path):
    doctor = [sys.executable, "-m", "lightning_grpo.cli.main", "doctor", "--json"]
    asked = subprocess.run(
        ["srun", "-N2", "--ntasks-per-node=1", *doctor],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stdout + asked.stderr
    found = [json.loads(line) for line in asked.stdout.splitlines()]
    shared = [each["found"] for each in found if each["check"] == "shared folder"]
    assert len(shared) == 2
    assert all("sees the files of 2 of 2 ranks" in words for words in shared)
    assert len([each for each in found if each["check"] == "ranks"]) == 2
    assert not list(tmp_path.iterdir())
