"""A Slurm job: trainer ranks on some nodes, servers on others, in one allocation."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_grpo.errors import ConfigError

WARNING_S = 120
"""Slurm warns with SIGUSR1 so long before the time limit: time to save and to be requeued."""

_SLURM_SERVERS = "lightning_grpo.SlurmServers"


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of Slurm and of `lightning-grpo fit`.

    Attributes:
        program: The command line up to `lightning-grpo`'s own arguments.
        fit: `--config ...` and other options of `fit`.
        servers: Class and arguments of the servers that the config names.
        train_nodes: Nodes with trainer ranks.
        server_nodes: Nodes with servers; 0: the first trainer node serves, as without Slurm.
        ranks_per_node: Trainer ranks on each node.
        gpus_per_node: GPUs to ask for on every node; 0 asks for none.
        name: Of the job.
        folder: Where the job's runs, logs and messages go; shared by all nodes.
        setup: Shell lines before anything is run.
        directives: Further `#SBATCH --key=value` lines (partition, account, qos, time, ...).
    """

    program: Sequence[str]
    fit: Sequence[str]
    servers: Mapping[str, Any]
    train_nodes: int = 1
    server_nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    name: str = "grpo"
    folder: str = "runs"
    setup: Sequence[str] = ()
    directives: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = {"train_nodes": 1, "server_nodes": 0, "ranks_per_node": 1, "gpus_per_node": 0}
        for name, smallest in least.items():
            if vars(self)[name] < smallest:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"`{option}` must be >= {smallest}, got {vars(self)[name]}.")


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
    fit = [
        *job.fit,
        *("--trainer.num_nodes", str(job.train_nodes)),
        *("--trainer.devices", str(job.ranks_per_node)),
    ]
    command = f'{program} fit {shlex.join(fit)} --trainer.default_root_dir "$run"'
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
        f'  {program} launch slurm-node --folder "$mail" &',
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
