"""The entry point, with the standard library alone: help, version, dispatch, environment variables.

A command is a function `(argv) -> exit code` in a module of this folder, which is imported when it
is called, so that help and a mistyped command cost no import of torch. This is the one place where
the command line reads and sets environment variables.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from pathlib import Path

from lightning_grpo.errors import (
    ConfigError,
    GRPOError,
    PromptError,
    RewardError,
    ServerStartError,
    StopRun,
    printable,
)

COMMANDS = {
    "init": ("folders.init", "make a folder to start a task of your own from"),
    "fit": (
        "fit.fit",
        "train: lightning-grpo fit --config gsm8k.yaml [--trainer.max_steps 100 ...]",
    ),
    "doctor": ("preflight.doctor", "look at the machine and the config before a run"),
    "certify": (
        "certify.certify",
        "prove by a tiny model of its kind that a model's path is right",
    ),
    "plan": ("preflight.plan", "say before a run whether it fits, and how long a step takes"),
    "validate": ("fit.validate", "score a model on the held-out prompts, with the same config"),
    "test": ("fit.test", "the same on the test prompts"),
    "serve": ("launch.serve", "start the embedded engine for a model on this machine's CPU"),
    "show": ("trajectories.show", "read the trajectories that a run has written"),
    "report": ("report.report", "look at runs: a page of curves, answers and the timeline"),
    "export": ("folders.export", "turn a checkpoint into a Hugging Face folder"),
    "launch": ("launch.launch", "write or submit a Slurm or Ray job"),
    "install-server": ("launch.install", "make the servers' own environment"),
    "score": ("trajectories.score", "try a reward on stored trajectories"),
    "replay": ("fit.replay", "train from stored trajectories, without servers"),
}
"""Command -> (its function in a module of this folder, one line of help)."""

_RUNS = ("fit", "validate", "test", "replay")
"""What may fail after hours, of what nobody wrote down; the other commands only read and write."""
_FAILED, _MISUSED, _SIGINT = 1, 2, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; None takes the process's own.

    Returns:
        0 done, 1 failed, 2 a mistake in the command or configuration, 128 + n ended by signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = arguments[0]
    if command in COMMANDS:
        return _run(command, arguments[1:])
    if command in ("-h", "--help", "help"):
        sys.stdout.write(_help())
    elif command in ("-V", "--version"):
        sys.stdout.write(f"lightning-grpo {_version()}\n")
    else:
        return _unknown(command)
    return 0


def _run(command: str, arguments: list[str]) -> int:
    """Run a command's function and turn what ends it into an exit code."""
    try:
        prepare_imports()
        module, _, name = COMMANDS[command][0].partition(".")
        run: Callable[[list[str]], int] = getattr(import_module(f"{__package__}.{module}"), name)
        return run(arguments)
    except (GRPOError, KeyboardInterrupt, RuntimeError, OSError, SystemExit) as error:
        ended = _ended(error, command, arguments)
        if ended is None:
            raise
    code, lines = ended
    if code == _FAILED or is_first_rank():
        for line in lines:
            _say(line)
    return code


def _ended(
    error: BaseException, command: str, arguments: list[str]
) -> tuple[int, list[str]] | None:
    """The exit code and the words for what ended a command; None: it is raised as it is."""
    if isinstance(error, SystemExit) and not isinstance(error, StopRun):
        # Lightning turns an interrupt into exit code 1.
        interrupt = error.__context__
        return explain(interrupt) if isinstance(interrupt, KeyboardInterrupt) else None
    if wants_traceback() or not _is_told(error):
        return None
    code, lines = explain(error)
    if isinstance(error, GRPOError) and error.saved_to and is_first_rank():
        lines = [] if isinstance(error, StopRun) else lines
        lines.append(f"go on with: {resume_command(command, arguments, error.saved_to)}")
    if command in _RUNS and command != "replay":  # whose options are its own
        lines += doctor_words(error, arguments)
    if isinstance(error, OSError) and command not in _RUNS:
        code, lines = _MISUSED, lines[:1]
        if isinstance(error, BrokenPipeError):
            # Whoever reads has what it wanted (`show | head`): nothing to say, nor at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, lines = 128 + signal.SIGPIPE, []
    return code, lines


def _is_told(error: BaseException) -> bool:
    """Whether what ended a command is said in a message of its own."""
    return isinstance(error, GRPOError | KeyboardInterrupt | OSError) or is_out_of_memory(error)


_ROOM = (
    "lower `model.max_tokens_per_microbatch`, set `model.gradient_checkpointing: true` or "
    "`model.lora`, shard over more GPUs (`fsdp2`); where a server shares the GPU, lower "
    "`data.servers.memory_fraction`, too. Then go on with `--ckpt_path last`."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was full; torch is not imported to find out."""
    return type(error).__name__ == "OutOfMemoryError"


def explain(error: BaseException) -> tuple[int, list[str]]:
    """The exit code and the words for what ended a command."""
    match error:
        case StopRun():
            return int(error.code or 0), [f"stopped: {error}"]
        case KeyboardInterrupt():
            return 128 + _SIGINT, ["stopped: interrupted"]
        case ConfigError():
            return _MISUSED, [f"error: {error}"]
    lines = [f"{type(error).__name__}: {error}"]
    if isinstance(error, OSError) and not isinstance(error, GRPOError):
        place = f": {error.filename}" if error.filename else ""
        lines = [f"error: {error.strerror or error}{place}"]
    if is_out_of_memory(error):
        lines = [f"the trainer's GPU is full: {str(error).splitlines()[0]}", _ROOM]
    return _FAILED, [*lines, "(LIGHTNING_GRPO_TRACEBACK=1 shows where it came from)"]


def resume_command(command: str, arguments: list[str], checkpoint: str) -> str:
    """The same command, from a checkpoint, to copy."""
    words = ["lightning-grpo", command]
    rest = iter(arguments)
    for word in rest:
        if word == "--ckpt_path":
            next(rest, None)
        elif not word.startswith("--ckpt_path="):
            words.append(word)
    return shlex.join([*words, "--ckpt_path", checkpoint])


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def doctor_words(error: BaseException, arguments: list[str]) -> list[str]:
    """Which line of `doctor` looks at what has ended a run, with the command to copy."""
    options: tuple[str, ...] = ()
    match error:
        case ServerStartError():
            check, options = "start", ("--start",)
        case PromptError():
            check = "prompts"
        case RewardError():
            check = "reward"
        case OSError(errno=number) if number in _DISK:
            check = "disk"
        case _:
            return []
    command = shlex.join(["lightning-grpo", "doctor", *arguments, *options])
    return [f"the line `{check}` looks at this alone: {command}"]


def _unknown(command: str) -> int:
    """Name the nearest command."""
    nearest = get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    _say(f"error: `{command}` is not a command of lightning-grpo")
    _say(
        f"did you mean `lightning-grpo {nearest[0]}`?"
        if nearest
        else f"it has: {', '.join(COMMANDS)}"
    )
    return _MISUSED


def _help() -> str:
    """The top-level help."""
    rows = [f"  {name:<16}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning-grpo COMMAND [options]",
            "",
            "GRPO post-training of language models as a Lightning plugin.",
            "",
            *rows,
            "",
            "lightning-grpo COMMAND --help      the command's own options",
            "lightning-grpo --version",
            "",
        ]
    )


def _version() -> str:
    """The installed version; a bare checkout has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-grpo")
    except PackageNotFoundError:
        return "(not installed)"


def _say(line: str) -> None:
    """One line on standard error."""
    sys.stderr.write(printable(line) + "\n")


# -- environment variables and the import path -----------------------------------------------------

TRACEBACK = "LIGHTNING_GRPO_TRACEBACK"
"""Set to anything but 0, errors keep their tracebacks."""


_HARMLESS = ("antigravity", "docs", "examples", "scripts", "test", "tests", "this", "turtle")
"""Names that a folder of one's own has, and no program imports by."""

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Set by launchers: Lightning's, torchrun, srun."""


def prepare_imports() -> None:
    """Make files of the current folder importable and torch's C++ quiet, also in children.

    Ranks, reward workers and engines inherit `PYTHONPATH`, so `reward: my_rewards.f` means the
    same in all of them.

    Raises:
        ConfigError: A file of the folder would take the place of a module that others need.
    """
    here = os.getcwd()
    refuse_hiding(Path(here))
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    folders = looked_in()
    if here not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *folders])
    # Its warnings are about its own tear-down, such as memory that a stopped server had mapped.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def import_from(configs: Iterable[Path]) -> None:
    """Make files beside configs importable, after those of the current folder; also in children.

    A folder whose `yaml.py` would take the place of a module that others need is left out.
    """
    for folder in (str(config.absolute().parent) for config in configs):
        if folder in looked_in() or hiding(Path(folder)):
            continue
        inherited = looked_in()
        for places in (sys.path, inherited):
            here = [at for at, place in enumerate(places) if place in ("", os.getcwd())]
            places.insert(here[0] + 1 if here else 0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(inherited)


def looked_in() -> list[str]:
    """The folders of modules that are not installed."""
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


def refuse_hiding(folder: Path) -> None:
    """Refuse a folder whose `yaml.py` every import of `yaml` would find first.

    Raises:
        ConfigError: Which file it is.
    """
    file = hiding(folder)
    if file is not None:
        raise ConfigError(
            f"`{file.name}` in the current folder must have another name: {file.stem!r} is a "
            "module that this program needs, and this one would be imported in its place. Rename "
            "it, or run in another folder."
        )


def hiding(folder: Path) -> Path | None:
    """The file, or the package, of a folder that has the name of a module that is needed."""
    files = {file.stem: file for file in folder.glob("*.py")}
    files |= {file.parent.name: file.parent for file in folder.glob("*/__init__.py")}
    elsewhere = [place for place in sys.path if place and Path(place) != folder]
    return next(
        (
            file
            for name, file in sorted(files.items())
            if name not in _HARMLESS and _is_needed(name, file, elsewhere)
        ),
        None,
    )


def _is_needed(name: str, file: Path, elsewhere: list[str]) -> bool:
    """Whether a module of that name is Python's own, or that of a package we depend on."""
    if name in sys.stdlib_module_names:
        return True
    found = PathFinder.find_spec(name, elsewhere)
    if found is None or found.origin is None or Path(found.origin).is_relative_to(file):
        return False  # there is no other; or it is itself, installed to be worked on
    return not _dependencies().isdisjoint(metadata.packages_distributions().get(name, ()))


@cache
def _dependencies() -> set[str]:
    """The distributions that this one depends on, and those that they depend on."""
    found: set[str] = set()
    waiting = ["lightning-grpo"]
    while waiting:
        name = waiting.pop()
        with suppress(metadata.PackageNotFoundError):
            distribution = metadata.distribution(name)
            if distribution.name not in found:
                found.add(distribution.name)
                waiting += [re.split(r"[^\w.-]", need)[0] for need in distribution.requires or ()]
    return found


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks in place of messages."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and makes the run's folder."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def set_one_thread_default() -> bool:
    """Give this process and its children one compute thread each, unless the user chose.

    Returns:
        Whether the default was set (then torch, already loaded, must be told too).
    """
    if "OMP_NUM_THREADS" in os.environ:
        return False
    os.environ["OMP_NUM_THREADS"] = "1"
    return True


def silence_jsonargparse() -> None:
    """Hide that Lightning 2.6 calls jsonargparse 4.53 by deprecated names: not the user's fault."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


if __name__ == "__main__":
    sys.exit(main())
