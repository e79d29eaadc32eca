"""The entry point: help, version and dispatch, with the standard library alone.

A command is a function `(argv) -> exit code` in a module of this folder, which is imported when it
is called, so that help and a mistyped command cost no import of torch.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from lightning_grpo.cli.environment import is_first_rank, prepare_imports, wants_traceback
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
    "init": ("init.init", "make a folder to start a task of your own from"),
    "fit": (
        "fit.fit",
        "train: lightning-grpo fit --config gsm8k.yaml [--trainer.max_steps 100 ...]",
    ),
    "doctor": ("doctor.doctor", "look at the machine and the config before a run"),
    "certify": (
        "certify.certify",
        "prove by a tiny model of its kind that a model's path is right",
    ),
    "plan": ("plan.plan", "say before a run whether it fits, and how long a step takes"),
    "validate": ("fit.validate", "score a model on the held-out prompts, with the same config"),
    "test": ("fit.test", "the same on the test prompts"),
    "serve": ("server.serve", "start the embedded engine for a model on this machine's CPU"),
    "show": ("trajectories.show", "read the trajectories that a run has written"),
    "report": ("report.report", "look at runs: a page of curves, answers and the timeline"),
    "export": ("export.export", "turn a checkpoint into a Hugging Face folder"),
    "launch": ("launch.launch", "write or submit a Slurm or Ray job"),
    "install-server": ("server.install", "make the servers' own environment"),
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
    if isinstance(error, StopRun) and error.saved_to:
        lines = [f"go on with: {resume_command(command, arguments, error.saved_to)}"]
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


if __name__ == "__main__":
    sys.exit(main())
