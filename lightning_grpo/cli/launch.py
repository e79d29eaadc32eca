"""`lightning-grpo launch slurm`: write or submit a job; `slurm-node`: what a server node runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.cli.fit import split_configs
from lightning_grpo.cli.problem import ConfigProblem, nearest
from lightning_grpo.cli.sources import collect

_USAGE = """\
usage: lightning-grpo launch slurm --config FILE [--train-nodes 1] [--server-nodes 1] [options]

Print a Slurm job script for a run; `--submit` submits it. The config's servers start on the server
nodes, the trainer's ranks on the others. At the time limit the job saves, is requeued and goes on.

  lightning-grpo launch slurm --config gsm8k.yaml --gpus-per-node 8 --time 24:00:00
  lightning-grpo launch slurm --config gsm8k.yaml --server-nodes 2 --partition gpu --submit
"""
_DIRECTIVES = ("partition", "account", "qos", "time", "mem", "cpus-per-task", "constraint")
_KINDS = ("slurm", "slurm-node")


def run(argv: Sequence[str]) -> int:
    """Write or submit a job."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    if argv[0] not in _KINDS:
        rule = f"`{argv[0]}` is not something to launch with"
        raise ConfigProblem("launch", rule, "command line", nearest(argv[0], _KINDS))
    return serve_node(argv[1:]) if argv[0] == "slurm-node" else launch_slurm(argv[1:])


def launch_slurm(argv: Sequence[str]) -> int:
    """Print the job script, or submit it."""
    from lightning_grpo.launch.slurm import SlurmJob, job_script, submit

    options, fit = _slurm_parser().parse_known_args(list(argv))
    configs, others = split_configs(fit)
    if not configs:
        raise ConfigProblem("--config", "needs the name of a file", "command line")
    servers = collect(configs, others).plain().get("data", {}).get("servers")
    ranks = options.ranks_per_node or options.gpus_per_node or 1
    job = SlurmJob(
        program=(sys.executable, "-m", "lightning_grpo.cli.main"),
        fit=[*(word for _, path in configs for word in ("--config", str(path))), *others],
        servers=_class_and_arguments(servers),
        train_nodes=options.train_nodes,
        server_nodes=options.server_nodes,
        ranks_per_node=ranks,
        gpus_per_node=options.gpus_per_node,
        name=options.name or configs[0][1].stem,
        folder=options.folder,
        setup=options.setup,
        directives={
            key: value
            for key in _DIRECTIVES
            if (value := vars(options)[key.replace("-", "_")]) is not None
        },
    )
    script = job_script(job)
    if not options.submit:
        sys.stdout.write(script)
        return 0
    Path(options.folder).mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for the log
    number = submit(script)
    sys.stdout.write(f"submitted job {number}, log {options.folder}/slurm-{number}.out\n")
    return 0


def serve_node(argv: Sequence[str]) -> int:
    """Start servers on this node as the trainer asks, until the job step ends."""
    from lightning_grpo.servers.node import ServerNode

    parser = argparse.ArgumentParser(prog="lightning-grpo launch slurm-node", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="shared with the trainer")
    parser.add_argument("--node", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    parser.add_argument("--host", default=os.environ.get("SLURMD_NODENAME", "127.0.0.1"))
    options = parser.parse_args(list(argv))
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    # The warning before the time limit reaches every step of the job; it is the trainer's.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    ServerNode(options.folder, options.node, options.host).serve(end)
    return 0


def _slurm_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-grpo launch slurm",
        description=_USAGE.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Every other option is one of `lightning-grpo fit`.",
    )
    parser.add_argument("--train-nodes", type=int, default=1, help="nodes with trainer ranks")
    parser.add_argument("--server-nodes", type=int, default=1, help="nodes with servers")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="to ask for on every node")
    parser.add_argument("--ranks-per-node", type=int, help="default: its GPUs, else 1")
    parser.add_argument("--name", help="of the job; default: the config's")
    parser.add_argument("--folder", default="runs", help="for runs and logs, shared by all nodes")
    parser.add_argument("--setup", action="append", default=[], help="a shell line to begin with")
    for key in _DIRECTIVES:
        parser.add_argument(f"--{key}", help="sbatch's own")
    parser.add_argument("--submit", action="store_true", help="submit it")
    return parser


def _class_and_arguments(servers: Any) -> Mapping[str, Any]:
    """The config's `data.servers` with both of its keys."""
    if servers is None:
        raise ConfigProblem("data.servers", "is missing in the config")
    if isinstance(servers, str):
        return {"class_path": servers}
    return servers if isinstance(servers, dict) else {}
