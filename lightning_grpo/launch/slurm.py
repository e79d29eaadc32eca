"""Jobs, and Slurm scripts for them."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_grpo.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """A run of `lightning-grpo fit` on several nodes.

    Attributes:
        program: The command line up to `lightning-grpo`'s own arguments.
        fit: `--config ...` and other options of `fit`.
        servers: Class and arguments of the servers that the config names.
        train_nodes: Nodes with trainer ranks.
        server_nodes: Nodes with servers; 0: the first trainer node serves, as on one machine.
        ranks_per_node: Trainer ranks on each node.
        gpus_per_node: GPUs to ask for on every node; 0 asks for none.
        name: Of the job.
        folder: Where the job's runs, logs and messages go; shared by all nodes.
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

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = {"train_nodes": 1, "server_nodes": 0, "ranks_per_node": 1, "gpus_per_node": 0}
        for name, smallest in least.items():
            require_at_least(name, vars(self)[name], smallest)

    def fit_options(self) -> list[str]:
        """Of `fit`: the user's, and how many ranks there are."""
        return [
            *self.fit,
            *("--trainer.num_nodes", str(self.train_nodes)),
            *("--trainer.devices", str(self.ranks_per_node)),
        ]


def require_at_least(name: str, value: int, smallest: int) -> None:
    """Refuse a number by the option that it was given as."""
    if value < smallest:
        raise ConfigError(f"`--{name.replace('_', '-')}` must be >= {smallest}, got {value}.")


WARNING_S = 120
"""Slurm warns with SIGUSR1 so long before the time limit: time to save and to be requeued."""

_SLURM_SERVERS = "lightning_grpo.SlurmServers"
_NODES = "`--train-nodes` and `--server-nodes`"
_RANKS = "`--ranks-per-node`"
_SAID = {
    "nodes": _NODES,
    "ntasks": _RANKS,
    "ntasks-per-node": _RANKS,
    "gpus": "`--gpus-per-node`",
    "gpus-per-node": "`--gpus-per-node`",
    "gpus-per-task": "`--gpus-per-node`",
    "job-name": "`--name`",
}
"""What the script itself says, and what to say it with."""

_SHORT = dict(
    pair.split("=")
    for pair in """
    A=account B=extra-node-info C=constraint D=chdir G=gpus J=job-name L=licenses M=clusters N=nodes
    O=overcommit a=array b=begin c=cpus-per-task d=dependency e=error i=input k=no-kill
    m=distribution n=ntasks o=output p=partition q=qos s=oversubscribe t=time w=nodelist x=exclude
    """.split()
)
"""sbatch's options of one letter."""


@dataclass(frozen=True)
class SlurmJob(Job):
    """What is asked of Slurm.

    Attributes:
        setup: Shell lines before anything is run.
        directives: Further `#SBATCH --key=value` lines (partition, account, qos, time, ...); they
            take the place of the script's own.
        container: Options of `srun` for what starts the trainer and the servers in a container.
    """

    setup: Sequence[str] = ()
    directives: Mapping[str, str] = field(default_factory=dict)
    container: Sequence[str] = ()

    @property
    def logs(self) -> list[str]:
        """The files that Slurm is told to write; it makes no folder for them."""
        own = self.directives.get("output", f"{self.folder}/slurm-%j.out")
        return [own, *([self.directives["error"]] if "error" in self.directives else [])]


def sbatch_options(words: Sequence[str]) -> dict[str, str]:
    """Options of sbatch by their long names; `--gres=gpu:8`, `--gres gpu:8` and `-p gpu` are some.

    Raises:
        ConfigError: They are none, or the script itself says what they say.
    """
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
        else:
            name, equals, value = _SHORT.get(word[1:2], ""), word[2:], word[2:]
        if not (word.startswith("-") and name):
            raise ConfigError(
                f"after `--` stand options of sbatch, which begin with `-`, got `{word}`."
            )
        if not equals and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        if name in _SAID:
            raise ConfigError(
                f"`--{name}` can't be given to sbatch: the script says it itself. Use "
                f"{_SAID[name]}, before `--`."
            )
        found[name] = value
    return found


def gpus_of(directives: Mapping[str, str]) -> int:
    """GPUs of a node by `--gres=gpu:h100:8`; 0 where it names none."""
    for each in directives.get("gres", "").split(","):
        kind, _, rest = each.removeprefix("gres/").partition("(")[0].partition(":")
        if kind == "gpu":
            number = rest.rpartition(":")[2]
            return int(number) if number.isdigit() else 1
    return 0


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
    by_gres = gpus_of(job.directives) > 0
    asked = {
        "job-name": job.name,
        "nodes": str(job.train_nodes + job.server_nodes),
        "ntasks-per-node": str(job.ranks_per_node),
        **({"gpus-per-node": str(job.gpus_per_node)} if job.gpus_per_node and not by_gres else {}),
        "output": job.logs[0],
        "open-mode": "append",
        "requeue": "",
        "signal": f"USR1@{WARNING_S}",
        **job.directives,
    }
    if "no-requeue" in asked:
        del asked["requeue"]
    return ["#!/bin/bash", *(f"#SBATCH {_directive(*pair)}" for pair in asked.items())]


def _directive(key: str, value: str) -> str:
    # Slurm reads the line as a shell would, where it has to.
    quoted = shlex.quote(value) if set(value) & set(" \t#'\"\\") else value
    return f"--{key}={quoted}" if value else f"--{key}"


def _body(job: SlurmJob) -> list[str]:
    folder = shlex.quote(job.folder)
    lines = [
        *job.setup,
        "set -u",  # not before: scripts that activate an environment read unset variables
        f"run=$(realpath -m {folder})/{job.name}-$SLURM_JOB_ID",
        "export PYTHONUNBUFFERED=1",
    ]
    program = shlex.join(job.program)
    command = f'{program} fit {shlex.join(job.fit_options())} --trainer.default_root_dir "$run"'
    ranks = job.train_nodes * job.ranks_per_node
    rank_cpus, node_cpus = _cpus(job)
    container = "".join(f" {shlex.quote(word)}" for word in job.container)
    step = (
        f"srun --nodes={job.train_nodes} --ntasks={ranks} "
        f"--ntasks-per-node={job.ranks_per_node} --relative=0 --exact "
        f"--cpus-per-task={rank_cpus} --kill-on-bad-exit=0{container}"
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
        f"--relative={job.train_nodes} --exact --cpus-per-task={node_cpus}{container} \\",
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


def _cpus(job: SlurmJob) -> tuple[str, str]:
    """Cores of a rank, and of a node's servers: since Slurm 22.05 `srun` takes one if not told."""
    given = job.directives.get("cpus-per-task")
    if given and given.isdigit():
        return given, str(int(given) * job.ranks_per_node)
    return f"$((SLURM_CPUS_ON_NODE / {job.ranks_per_node}))", "$SLURM_CPUS_ON_NODE"
