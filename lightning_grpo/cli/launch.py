"""`lightning-grpo launch slurm | ray`: a run on a cluster; `server-node`: what serves there."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_grpo.cli.jobs import job_parser, job_settings
from lightning_grpo.cli.sources import ConfigProblem, Parser, nearest
from lightning_grpo.errors import ConfigError

_SLURM_USAGE = """\
usage: lightning-grpo launch slurm --config FILE [options] [-- options of sbatch]

Print a Slurm job script for a run; `--submit` submits it. The config's servers start on the server
nodes, the trainer's ranks on the others. At the time limit the job saves, is requeued and goes on.
Any option of sbatch stands after `--`; `--container...` is given to the steps that run something.

  lightning-grpo launch slurm --config gsm8k.yaml --gpus-per-node 8 --time 24:00:00
  lightning-grpo launch slurm --config gsm8k.yaml --server-nodes 2 --partition gpu --submit
  lightning-grpo launch slurm --config gsm8k.yaml -- --gres=gpu:h100:8 --exclusive
"""
_RAY_USAGE = """\
usage: lightning-grpo launch ray --config FILE [--train-nodes 1] [--server-nodes 1] [options]

Run on a Ray cluster (the extra `ray`): the config's servers start on the server nodes, the
trainer's ranks on the others, each node in a placement of its own. Logs are brought to the run's
folder. When a node or a rank is lost, the run is begun again from its last checkpoint, up to
`--max-restarts` times. Ctrl-C saves and ends it.

  lightning-grpo launch ray --config gsm8k.yaml --gpus-per-node 8 --max-restarts 3
  lightning-grpo launch ray --config gsm8k.yaml --server-nodes 2 --address 10.0.0.1:6379
"""
_DIRECTIVES = ("partition", "account", "qos", "time", "mem", "cpus-per-task", "constraint")


def run(argv: Sequence[str]) -> int:
    """Launch, or serve a node."""
    kinds: dict[str, Callable[[Sequence[str]], int]] = {
        "slurm": launch_slurm,
        "ray": launch_ray,
        "server-node": serve_node,
    }
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(f"{_SLURM_USAGE}\n{_RAY_USAGE}")
        return 0
    if argv[0] not in kinds:
        rule = f"`{argv[0]}` is not something to launch with"
        raise ConfigProblem("launch", rule, "command line", nearest(argv[0], kinds))
    return kinds[argv[0]](argv[1:])


def launch_slurm(argv: Sequence[str]) -> int:
    """Print the job script, or submit it."""
    from lightning_grpo.launch.slurm import SlurmJob, gpus_of, job_script, sbatch_options, submit

    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    passed = sbatch_options(words[split + 1 :])
    parser = job_parser("slurm", _SLURM_USAGE)
    parser.add_argument("--setup", action="append", default=[], help="a shell line to begin with")
    for key in _DIRECTIVES:
        parser.add_argument(f"--{key}", help="sbatch's own")
    parser.add_argument("--submit", action="store_true", help="submit it")
    options, fit = parser.parse_known_args(words[:split])
    given = {key: vars(options)[key.replace("-", "_")] for key in _DIRECTIVES}
    directives = {key: value for key, value in given.items() if value is not None} | passed
    container = [name for name in directives if name.startswith("container")]
    options.gpus_per_node = options.gpus_per_node or gpus_of(directives)
    job = SlurmJob(
        **job_settings(options, fit),
        setup=options.setup,
        container=[f"--{name}={directives[name]}".rstrip("=") for name in container],
        directives={key: value for key, value in directives.items() if key not in container},
    )
    script = job_script(job)
    for log in job.logs:
        make_log_folder(Path(job.directives.get("chdir", ".")) / log)
    if not options.submit:
        sys.stdout.write(script)
        return 0
    number = submit(script)
    sys.stdout.write(f"submitted job {number}, log {job.logs[0].replace('%j', number)}\n")
    return 0


def make_log_folder(log: Path) -> None:
    """Make the folder of a job's log, without which Slurm ends the job and says nothing."""
    fixed = list(itertools.takewhile(lambda part: "%" not in part, log.parent.parts))
    try:
        Path(*fixed).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder of the job's log, {log.parent}, can't be made: {error.strerror}. Name "
            "another with `--folder`."
        ) from error


def launch_ray(argv: Sequence[str]) -> int:
    """Run on a Ray cluster, to the end."""
    from lightning_grpo.launch.ray import RayJob, RayRun

    parser = job_parser("ray", _RAY_USAGE)
    parser.add_argument("--cpus-per-node", type=int, default=1, help="to ask for on every node")
    parser.add_argument("--max-restarts", type=int, default=0, help="from the last checkpoint")
    parser.add_argument("--address", default="auto", help="of the cluster; auto: this machine's")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds, for the cluster's room")
    options, fit = parser.parse_known_args(list(argv))
    job = RayJob(
        **job_settings(options, fit),
        cpus_per_node=options.cpus_per_node,
        max_restarts=options.max_restarts,
    )
    return RayRun(job, options.address, options.wait, _say).run()


def serve_node(argv: Sequence[str]) -> int:
    """Start servers on this node as the trainer asks, until the job ends it."""
    from lightning_grpo.servers.other_nodes import ServerNode

    parser = Parser(prog="lightning-grpo launch server-node", allow_abbrev=False)
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


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
