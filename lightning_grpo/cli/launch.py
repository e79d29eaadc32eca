"""What is started elsewhere: `launch slurm | ray` and `server-node`, `serve`, `install-server`.

`launch` puts a run on a cluster, and `server-node` is what serves there; both read alike what a job
is: nodes, ranks, and the config's servers. `serve` is the embedded engine, and `install-server`
makes SGLang's own environment.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.cli.fit import find_configs
from lightning_grpo.cli.sources import (
    SECTIONS,
    ConfigProblem,
    Parser,
    Setting,
    arguments_in,
    collect,
    names_class,
    nearest,
    read_options,
)
from lightning_grpo.cli.unimported import ROOTS, refuse_at_once
from lightning_grpo.errors import ConfigError, require_on_hub
from lightning_grpo.launch.slurm import require_at_least
from lightning_grpo.servers.sglang import (
    SGLANG_VERSION,
    examine_python,
    install_server,
    remember_python,
    server_folder,
)
from lightning_grpo.shipped import resolve_path

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

_SERVERS = "data.servers"
_PROGRAM = (sys.executable, "-m", "lightning_grpo.cli.main")


def launch(argv: Sequence[str]) -> int:
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


def job_parser(kind: str, usage: str) -> argparse.ArgumentParser:
    """The options of every cluster."""
    parser = Parser(
        prog=f"lightning-grpo launch {kind}",
        description=usage.partition("\n\n")[2],
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
    parser.add_argument(
        "--program",
        type=shlex.split,
        default=_PROGRAM,
        help="what starts `lightning-grpo` on the nodes, such as `apptainer exec --nv image.sif "
        "lightning-grpo`; default: this Python",
    )
    return parser


def job_settings(options: argparse.Namespace, fit: Sequence[str]) -> dict[str, Any]:
    """The fields of a `Job`, from its options and from those of `fit`.

    Raises:
        ConfigProblem: There is no config, or it names no servers, or none that the nodes can start.
    """
    configs, others = find_configs(fit)
    if not configs:
        raise ConfigProblem("--config", "needs the name of a file", "command line")
    _refuse_foreign(others)
    gpus, on_nodes = options.gpus_per_node, options.server_nodes > 0
    require_at_least("gpus_per_node", gpus, 0)
    settings = collect(configs, others)
    if options.program == _PROGRAM:  # else modules may be there that are not here
        refuse_at_once(settings)
        _refuse_own(settings)
    described = _class_and_arguments(settings.plain().get("data", {}))
    servers = _build(described)
    if on_nodes:
        # The nodes are told of these: SlurmServers and RayServers know no such settings.
        others = without(others, _SERVERS)
        _check_startable(servers, described["class_path"])
    if gpus:
        _check_fits(servers, gpus)
    ranks = options.ranks_per_node
    if ranks is None:
        ranks = (gpus if on_nodes else _left_to_train(servers, gpus)) or 1
    if gpus and ranks > gpus:
        raise ConfigError(
            "--ranks-per-node", f"must be at most `--gpus-per-node` ({gpus}), one GPU a rank", ranks
        )
    return {
        "program": tuple(options.program),
        "fit": [*(word for _, path in configs for word in ("--config", str(path))), *others],
        "servers": described,
        "train_nodes": options.train_nodes,
        "server_nodes": options.server_nodes,
        "ranks_per_node": ranks,
        "gpus_per_node": gpus,
        "name": options.name or configs[0][1].stem,
        "folder": options.folder,
    }


def _refuse_own(settings: Setting) -> None:
    """Refuse a section whose class is none of its kind, or takes no such settings, as `fit`."""
    named = [section for section in ROOTS if names_class(settings.value.get(section))]
    if named:
        from lightning_grpo.cli.mistakes import check_settings, import_object

        check_settings(settings, {section: import_object(ROOTS[section]) for section in named})


def without(arguments: Sequence[str], key: str) -> list[str]:
    """The options but those of one setting and of what is below it."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        words = [rest.pop(0)]
        name, equals, _ = words[0].removeprefix("--").partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        if name != key and not name.startswith(f"{key}."):
            kept += words
    return kept


def _refuse_foreign(arguments: Sequence[str]) -> None:
    """Refuse what is no setting: most often an option of the cluster's own."""
    for key, _ in read_options(arguments):
        if "." not in key and key.rstrip("+") not in SECTIONS:
            raise ConfigProblem(
                f"--{key}",
                "is an option neither of `launch` nor of `fit`",
                "command line",
                "options of sbatch stand at the end, after `--`",
            )


def _class_and_arguments(data: Any) -> dict[str, Any]:
    """The config's `data.servers` with both of its keys, whichever way they were written."""
    found = arguments_in(data).get("servers") if isinstance(data, dict) else None
    found = {"class_path": found} if isinstance(found, str) else found
    if not isinstance(found, dict) or not isinstance(found.get("class_path"), str):
        raise ConfigProblem(_SERVERS, "must name the servers' class, which is missing")
    arguments = arguments_in(found)
    class_path = found["class_path"]
    if "." not in class_path:  # as jsonargparse finds it
        class_path = f"lightning_grpo.{class_path}"
    return {"class_path": class_path, **({"init_args": arguments} if arguments else {})}


def _build(described: Mapping[str, Any]) -> Any:
    """The servers, to look at; None where their class is only on the nodes."""
    module, _, name = described["class_path"].rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    except AttributeError as error:
        raise ConfigProblem(_SERVERS, f"`{described['class_path']}` does not exist") from error
    arguments = dict(described.get("init_args", {}))
    for key in arguments:
        if key not in inspect.signature(made).parameters:
            rule = f"is not a setting of {name}"
            place = f"{_SERVERS}.{key}"
            raise ConfigProblem(place, rule, "", nearest(key, inspect.signature(made).parameters))
    return made(**arguments)


def _check_startable(servers: Any, class_path: str) -> None:
    from lightning_grpo.servers.process import OwnedServers

    if servers is not None and not isinstance(servers, OwnedServers):
        raise ConfigError(
            "data.servers",
            "must be servers that a node can start",
            class_path,
            "Use `--server-nodes 0` for servers that run already.",
        )


def _check_fits(servers: Any, gpus: int) -> None:
    """Refuse servers that need more GPUs than a node has."""
    tp, devices = getattr(servers, "tp", 1), getattr(servers, "devices", None) or ()
    if tp > gpus:
        raise ConfigError(
            "data.servers.tp",
            f"must be at most `--gpus-per-node` ({gpus}), since a server is on one node",
            tp,
            "Lower it, or ask for nodes with more GPUs.",
        )
    number = getattr(servers, "num_servers", None) or 1
    if tp > 1 and number * tp > gpus:
        raise ConfigError(
            f"`data.servers.num_servers` x `tp` must be at most `--gpus-per-node` ({gpus}), got "
            f"{number} x {tp}. Leave `num_servers` out: one is started for each {tp} GPUs."
        )
    beyond = [device for device in devices if device >= gpus]
    if beyond:
        raise ConfigError(
            "data.servers.devices",
            f"must be GPUs 0 to {gpus - 1} of a node (`--gpus-per-node {gpus}`)",
            beyond,
            "Leave it out: servers on nodes of their own use all.",
        )


def _left_to_train(servers: Any, gpus: int) -> int:
    """How many GPUs of a node the servers leave, where they are on a node that trains."""
    from lightning_grpo.servers.base import serving_devices, training_devices
    from lightning_grpo.servers.sglang import SGLangServers

    if not isinstance(servers, SGLangServers):
        return gpus
    present = list(range(gpus))
    return len(training_devices(present, servers.devices or serving_devices(present)))


# -- serve, install-server -------------------------------------------------------------------------

_ROOM_GB = {"cpu": 4, "cuda": 15}
"""What to keep free for an environment, with pip's cache left out."""

_SERVE_USAGE = """\
usage: lightning-grpo serve MODEL [options of the engine]

Serve a model (a Hugging Face folder, a hub id or shipped:NAME) on this machine's CPU, behind
SGLang's HTTP API and OpenAI's (`/v1/models`, `/v1/completions`, `/v1/chat/completions`, streaming
too; without tools and structured output). Prints `READY http://HOST:PORT` when it answers; Ctrl-C
ends it.

  lightning-grpo serve shipped:quickstart --port 30000
  OPENAI_BASE_URL=http://127.0.0.1:30000/v1 OPENAI_API_KEY=- python my_agent.py

The engine's options:
"""


def serve(argv: Sequence[str]) -> int:
    """Become the engine's process."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_SERVE_USAGE)
        sys.stdout.flush()
        argv = ["--help"]
    elif not argv[0].startswith("-") and not _is_folder(resolve_path(argv[0])):
        require_on_hub("MODEL", argv[0], "model")  # before torch is imported, which takes seconds
    command = engine_command(argv)
    os.execv(command[0], command)


def _is_folder(path: str) -> bool:
    return bool(path) and Path(path).is_dir()


def engine_command(argv: Sequence[str]) -> list[str]:
    """The engine's command line for the arguments of `serve`."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", resolve_path(arguments[0]), *arguments[1:]]
    return [sys.executable, "-m", "lightning_grpo.engine", *arguments]


_INSTALL_USAGE = """\
Install SGLang into a virtual environment of its own, and remember it: SGLangServers starts servers
with it from then on. The trainer does not need SGLang, and the two need different versions of torch
and transformers.

  lightning-grpo install-server --dry-run                        where, what and how large
  lightning-grpo install-server
  lightning-grpo install-server --use /opt/sglang/bin/python     remember one that is there
  lightning-grpo install-server --cpu -- --extra-index-url URL   options of pip after --
"""


def install(argv: Sequence[str]) -> int:
    """Install and remember, or only remember."""
    options, pip_arguments = _install_options(argv)
    device = "cpu" if options.cpu else "cuda"
    if options.use is not None:
        if not (options.use.is_file() and os.access(options.use, os.X_OK)):
            raise ConfigError("--use", "must be an interpreter that has SGLang", str(options.use))
        installed = examine_python(options.use.absolute(), device)
        if options.dry_run:
            print(f"would remember SGLang {installed.sglang}: {installed.python}")
            return 0
    else:
        if options.folder is not None and options.folder.is_file():
            raise ConfigError("--folder", "must be a folder, new or made so", str(options.folder))
        folder = server_folder(options.folder, options.version, device)
        print(f"SGLang {options.version} for the {device}: {describe_room(folder, device)}")
        if options.dry_run:
            words = ["pip", "install", *pip_arguments, f"sglang=={options.version}"]
            print(f"would make a virtual environment there and run in it: {shlex.join(words)}")
            return 0
        installed = install_server(folder, options.version, device, pip_arguments, print)
    file = remember_python(installed)
    print(f"SGLang {installed.sglang} for the {device}: {installed.python}\nremembered in {file}")
    return 0


def _install_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    arguments = list(argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(
        prog="lightning-grpo install-server",
        description=_INSTALL_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--folder", type=Path, help="where (default: this user's data folder)")
    parser.add_argument("--version", default=SGLANG_VERSION, help=f"default: {SGLANG_VERSION}")
    parser.add_argument(
        "--cpu", action="store_true", help="leave out what only a GPU needs (for tests; slow)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and no more"
    )
    parser.add_argument("--use", type=Path, help="an interpreter that has SGLang already")
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def describe_room(folder: Path, device: str) -> str:
    """How much room an environment wants, and how much there is."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / 1e9
    return f"allow {_ROOM_GB[device]} GB in {folder}, where {free:.0f} GB are free"
