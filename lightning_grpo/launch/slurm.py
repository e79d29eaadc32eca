"""A Slurm job: trainer ranks on some nodes, servers on others, in one allocation."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_grpo.errors import ConfigError
from lightning_grpo.launch.job import Job

WARNING_S = 120
"""Slurm warns with SIGUSR1 so long before the time limit: time to save and to be requeued."""

_SLURM_SERVERS = "lightning_grpo.SlurmServers"


@dataclass(frozen=True)
class SlurmJob(Job):
    """What is asked of Slurm.

    Attributes:
        setup: Shell lines before anything is run.
        directives: Further `#SBATCH --key=value` lines (partition, account, qos, time, ...).
    """

    setup: Sequence[str] = ()
    directives: Mapping[str, str] = field(default_factory=dict)


def job_script(job: SlurmJob) -> str:
    """The sbatch script.

    Each start of the job, requeued ones included, has its own folder for messages between trainer
    and servers; the run's folder is the job's, so that a requeued job finds its checkpoint.
    """
    return "\n".join([*_header(job), "", *_body(job), ""])


def submit(script: str) -> str:
    """Hand the script to `sbatch`; returns the job's id.

    Raises:
        ConfigError: Slurm is not here, or refuses the job.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise ConfigError(
            "`--submit` needs `sbatch`, which is not on this machine. Print the script instead."
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise ConfigError(f"Slurm refused the job: {said}")
    return done.stdout.strip().partition(";")[0]


def _header(job: SlurmJob) -> list[str]:
    asked = {
        "job-name": job.name,
        "nodes": str(job.train_nodes + job.server_nodes),
        **({"gpus-per-node": str(job.gpus_per_node)} if job.gpus_per_node else {}),
        "output": f"{job.folder}/slurm-%j.out",
        "open-mode": "append",
        "requeue": "",
        "signal": f"USR1@{WARNING_S}",
        **job.directives,
    }
    lines = [f"#SBATCH --{key}{'=' if value else ''}{value}" for key, value in asked.items()]
    return ["#!/bin/bash", *lines]


def _body(job: SlurmJob) -> list[str]:
    folder = shlex.quote(job.folder)
    lines = [
        "set -u",
        *job.setup,
        f"run=$(realpath -m {folder})/{job.name}-$SLURM_JOB_ID",
        "export PYTHONUNBUFFERED=1",
    ]
    program = shlex.join(job.program)
    command = f'{program} fit {shlex.join(job.fit_options())} --trainer.default_root_dir "$run"'
    ranks = job.train_nodes * job.ranks_per_node
    step = (
        f"srun --nodes={job.train_nodes} --ntasks={ranks} "
        f"--ntasks-per-node={job.ranks_per_node} --relative=0 --exact --kill-on-bad-exit=0"
    )
    if not job.server_nodes:
        return [*lines, f"{step} {command}"]
    spec = json.dumps(job.servers)
    servers = [
        f'  --data.servers {_SLURM_SERVERS} --data.servers.folder "$mail"',
        f"  --data.servers.num_nodes {job.server_nodes} --data.servers.servers {shlex.quote(spec)}",
    ]
    return [
        *lines,
        'mail="$run/nodes-${SLURM_RESTART_COUNT:-0}"',
        "",
        "# servers",
        f"srun --nodes={job.server_nodes} --ntasks={job.server_nodes} --ntasks-per-node=1 "
        f"--relative={job.train_nodes} --exact \\",
        f'  {program} launch server-node --folder "$mail" &',
        "servers=$!",
        "",
        "# trainer",
        f"{step} \\",
        f"  {command} \\",
        " \\\n".join(servers),
        "status=$?",
        "",
        "# The servers end when they see this file.",
        'touch "$mail/end"',
        "for _ in $(seq 60); do kill -0 $servers 2>/dev/null || break; sleep 1; done",
        "kill $servers 2>/dev/null",
        "exit $status",
    ]
