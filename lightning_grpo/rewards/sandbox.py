"""Runs a Python program that nobody has read, in a process of its own, under limits."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lightning_grpo.checks import require_count, require_seconds
from lightning_grpo.rewards.confine import Confinement

Ending = Literal["done", "raised", "exited", "timed_out", "too_much_output", "killed"]
"""How a program ended: to its end, by an exception, by leaving early, or by a limit."""

_OUT, _ERR, _IN, _ORDERS = "stdout", "stderr", "stdin", "orders"
_BACKSTOP_S = 2


@dataclass(frozen=True)
class CodeLimits:
    """What a program may use.

    Args:
        timeout_s: Wall time; must be below the reward's own time limit.
        memory_mb: Memory beyond the interpreter's.
        output_mb: Size of its output, and of any file that it writes.
        network: Whether it may open network sockets.
    """

    timeout_s: float = 5.0
    memory_mb: int = 512
    output_mb: int = 1
    network: bool = False

    def __post_init__(self) -> None:
        """Refuse limits that nothing could run under."""
        require_seconds("timeout_s", self.timeout_s)
        require_count("memory_mb", self.memory_mb, most=1 << 24)
        require_count("output_mb", self.output_mb, most=1 << 20)


@dataclass(frozen=True)
class CodeResult:
    """What became of a program.

    Attributes:
        ending: How it ended; `done` only where it, and its tests, ran to the end.
        stdout: What it printed.
        stderr: What it complained of, a traceback's end included.
        missing: Protections that this machine could not give.
    """

    ending: Ending
    stdout: str
    stderr: str
    missing: tuple[str, ...] = ()


_DEFAULT_LIMITS = CodeLimits()


def run_python(
    source: str, tests: str = "", stdin: str = "", limits: CodeLimits = _DEFAULT_LIMITS
) -> CodeResult:
    """Run a program, then tests in the same namespace.

    The program has a scratch folder of its own (the only place that it may write to; gone
    afterwards), no network, no environment variables, and can't start processes. An early
    `sys.exit(0)` is `exited`, never `done`.

    Args:
        source: The program.
        tests: Statements that raise where it is wrong.
        stdin: Its standard input.
        limits: What it may use.
    """
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        outside = Path(folder, "held")
        outside.mkdir()
        (outside / _IN).write_text(stdin, encoding="utf-8", errors="surrogateescape")
        confinement = Confinement(
            limits.memory_mb,
            int(limits.timeout_s) + _BACKSTOP_S,
            limits.output_mb,
            str(scratch),
            network=limits.network,
        )
        orders = {
            "parent": os.getpid(),
            "stdin": str(outside / _IN),
            "nonce": nonce,
            "source": source,
            "tests": tests,
            "limits": asdict(confinement),
        }
        (outside / _ORDERS).write_text(json.dumps(orders))
        status = _run(outside, scratch, limits.timeout_s)
        cap = limits.output_mb * 2**20
        stdout, stderr = _read(outside / _OUT, cap), _read(outside / _ERR, cap)
    return _result(status, stdout, stderr, nonce)


def _run(outside: Path, scratch: Path, timeout_s: float) -> int | None:
    """The exit status; None: the time was up."""
    script = Path(__file__).with_name("confined_python.py")
    with (
        (outside / _ORDERS).open("rb") as orders,
        (outside / _OUT).open("wb") as stdout,
        (outside / _ERR).open("wb") as stderr,
    ):
        (outside / _ORDERS).unlink()  # the descriptor is enough, and the program can't open it
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(script)],
            stdin=orders,
            stdout=stdout,
            stderr=stderr,
            cwd=scratch,
            env={},
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process.pid)
            process.wait()


def end_group(group: int) -> None:
    """Kill a process group, if it is still there."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _read(path: Path, most: int) -> str:
    with path.open("rb") as file:
        return file.read(most).decode("utf-8", "replace")


def _result(status: int | None, stdout: str, stderr: str, nonce: str) -> CodeResult:
    first, _, rest = stderr.partition("\n")
    try:
        missing: Sequence[str] = json.loads(first)
    except ValueError:
        missing, rest = (), stderr
    finished = stdout.endswith(nonce)
    shown = stdout.removesuffix(nonce) if finished else stdout
    return CodeResult(_ending(status, finished), shown, rest, tuple(missing))


def _ending(status: int | None, finished: bool) -> Ending:
    if status is None:
        return "timed_out"
    if status == 0:
        return "done" if finished else "exited"
    by_limit: dict[int, Ending] = {
        -signal.SIGXFSZ: "too_much_output",
        -signal.SIGXCPU: "timed_out",
    }
    return by_limit.get(status, "killed" if status < 0 else "raised")
