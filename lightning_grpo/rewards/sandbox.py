"""Runs Python programs that nobody has read in processes of their own, and rewards what they do.

Every run has limits. A completion's program is held against tests, or inputs with expected outputs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from typing_extensions import override

from lightning_grpo.errors import require_count, require_seconds
from lightning_grpo.rewards.confine import Confinement, interpreter_files
from lightning_grpo.rewards.confined_python import PROGRAM_ENDED

Ending = Literal["done", "raised", "exited", "timed_out", "too_much_output", "killed"]
"""How a program ended: to its end, by an exception, by leaving early, or by a limit."""

_OUT, _ERR, _IN, _ORDERS = "stdout", "stderr", "stdin", "orders"
_BACKSTOP_S = 2
_REAPED_WITHIN_S = 1.0
_LOOKS_EVERY_S = 0.05
_MOST_FILES, _MOST_DEPTH = 1000, 32
_TIMES_IN_ALL = 100
"""So many times `output_mb` may all files of a program take."""


@dataclass(frozen=True)
class CodeLimits:
    """What a program may use.

    Args:
        timeout_s: Wall time; must be below the reward's own time limit.
        memory_mb: Memory beyond the interpreter's.
        output_mb: Size of its output, and of any file that it writes; 1,000 files and 100 times
            that in all.
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


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder that goes whatever a program has put into it."""

    @override
    def cleanup(self) -> None:
        """Remove it; before Python 3.13 `shutil` goes no deeper than Python's own stack."""
        try:
            super().cleanup()
        except RecursionError:
            subprocess.run(["rm", "-rf", "--", self.name], check=False)


def run_python(
    source: str, tests: str = "", stdin: str = "", limits: CodeLimits = _DEFAULT_LIMITS
) -> CodeResult:
    """Run a program, and tests of what it defines in another process.

    The program has a scratch folder of its own (the only place that it may write to; gone
    afterwards), can read only what Python itself needs, has no network, no environment variables,
    and can't start processes. The tests run beside it, out of its reach: its functions stand there
    for calls of it, by which plain data goes and comes. An early `sys.exit(0)` is `exited`, never
    `done`, where there are tests.

    Args:
        source: The program.
        tests: Statements that raise where it is wrong.
        stdin: Its standard input.
        limits: What it may use.
    """
    with (
        ScratchFolder(prefix="program-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as held,
    ):
        program, judge = Path(folder, "program"), Path(folder, "judge")
        began = time.monotonic()
        if not tests:
            running = held.enter_context(_started(program, limits, source=source, stdin=stdin))
            ending = _ending(_waited(running, limits.timeout_s, program, limits))
        else:
            (asked, ask), (answered, answer) = os.pipe(), os.pipe()
            running = held.enter_context(
                _started(program, limits, (asked, answer), source=source, stdin=stdin)
            )
            testing = held.enter_context(_started(judge, limits, (answered, ask), tests=tests))
            status = _waited(testing, limits.timeout_s, program, limits)
            ending = _ending(status)
            if status == PROGRAM_ENDED:
                left_s = limits.timeout_s - (time.monotonic() - began)
                ending = _ending(_waited(running, left_s, program, limits))
                ending = "exited" if ending == "done" else ending
        held.close()
        stdout, stderr, missing = _output(program, limits)
        if tests:
            stderr += _output(judge, limits)[1]
    return CodeResult(ending, stdout, stderr, missing)


@contextlib.contextmanager
def _started(
    folder: Path,
    limits: CodeLimits,
    pipes: tuple[int, ...] = (),
    source: str = "",
    tests: str | None = None,
    stdin: str = "",
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a folder of its own, ended with the block; the pipes become its own."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    (folder / _IN).write_text(stdin, encoding="utf-8", errors="surrogateescape")
    wrapper = bubblewrap(str(scratch), network=limits.network)
    confinement = Confinement(
        limits.memory_mb,
        int(limits.timeout_s) + _BACKSTOP_S,
        limits.output_mb,
        str(scratch),
        (*interpreter_files(), str(folder / _IN)),
        network=limits.network,
    )
    orders = {
        "parent": None if wrapper else os.getpid(),
        "stdin": str(folder / _IN),
        "source": source,
        "tests": tests,
        "pipes": pipes,
        "limits": asdict(confinement),
    }
    (folder / _ORDERS).write_text(json.dumps(orders))
    script = Path(__file__).with_name("confined_python.py")
    with (
        (folder / _ORDERS).open("rb") as orders_file,
        (folder / _OUT).open("wb") as stdout,
        (folder / _ERR).open("wb") as stderr,
    ):
        (folder / _ORDERS).unlink()  # the descriptor is enough, and no program can open it
        process = subprocess.Popen(
            [*wrapper, sys.executable, "-I", "-X", "utf8", str(script)],
            stdin=orders_file,
            stdout=stdout,
            stderr=stderr,
            cwd=scratch,
            env={},
            pass_fds=pipes,
            start_new_session=True,
        )
    try:
        for descriptor in pipes:
            os.close(descriptor)
        yield process
    finally:
        end_group(process.pid)
        process.wait()


def _waited(
    process: subprocess.Popen[bytes], timeout_s: float, folder: Path, limits: CodeLimits
) -> int | None:
    """The exit status, that of a file too large where the folder is too full; None: time was up."""
    until = time.monotonic() + timeout_s
    while True:
        left_s = until - time.monotonic()
        try:
            return process.wait(max(0.0, min(left_s, _LOOKS_EVERY_S)))
        except subprocess.TimeoutExpired:
            if _is_full(folder, limits.output_mb * _TIMES_IN_ALL << 20):
                return -signal.SIGXFSZ
            if left_s <= 0:
                return None


def _is_full(folder: Path, most_bytes: int) -> bool:
    """Whether it holds more than anybody wants to remove again."""
    count = size = 0
    # By descriptors: names can be too long to be opened.
    for name, folders, files, descriptor in os.fwalk(folder):
        count += len(folders) + len(files)
        if count > _MOST_FILES or name.count("/") - str(folder).count("/") > _MOST_DEPTH:
            return True
        for file in files:
            with contextlib.suppress(OSError):  # gone meanwhile
                size += os.stat(file, dir_fd=descriptor, follow_symlinks=False).st_blocks * 512
    return size > most_bytes


# ---- the boundary around what confines itself ------------------------------------------------
def bubblewrap(scratch: str, *, network: bool) -> list[str]:
    """What to put before a command, so that bubblewrap encloses it; empty where it can't be used.

    A process sees no other processes, no other's shared memory, and every folder but its scratch
    read-only.

    Args:
        scratch: The only folder that it may write to; where it runs.
        network: Whether it shares the machine's network.
    """
    program = _usable_bubblewrap()
    if program is None:
        return []
    return [*_enclosed(program), *([] if network else ["--unshare-net"]), *_writable(scratch), "--"]


@functools.cache
def _usable_bubblewrap() -> str | None:
    program = shutil.which("bwrap")
    if program is None:
        return None
    with tempfile.TemporaryDirectory(prefix="program-") as scratch:
        trial = [*_enclosed(program), "--unshare-net", *_writable(scratch), "--"]
        try:  # containers often have the program and forbid what it needs
            ended = subprocess.run(
                [*trial, sys.executable, "-c", ""], capture_output=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
    return program if ended.returncode == 0 else None


def _enclosed(program: str) -> list[str]:
    separate = ["--unshare-ipc", "--unshare-pid", "--unshare-uts", "--die-with-parent"]
    view = ["--ro-bind", "/", "/", "--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc"]
    return [program, *separate, *view]


def _writable(scratch: str) -> list[str]:
    return ["--bind", scratch, scratch, "--chdir", scratch]


def boundary() -> str:
    """One line for people: what holds programs in completions on this machine, and what doesn't."""
    missing = run_python("pass").missing
    kept = ["bubblewrap"] if _usable_bubblewrap() else []
    kept += [] if "files" in missing else ["Landlock"]
    kept += [] if "processes" in missing else ["seccomp"]
    line = ", ".join([*kept, "resource limits"])
    return f"{line}; NOT held back from: {', '.join(missing)}" if missing else line


def end_group(group: int) -> None:
    """Kill a process that leads a group, and the group, if it is still there.

    What bubblewrap started goes first: bubblewrap reaps it then, and no zombie is left to the first
    process of a container, which often reaps nothing.
    """
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(group)
        enclosed = leader.children() if "bwrap" in leader.name() else []
        for process in enclosed:
            process.kill()
        until = time.monotonic() + (_REAPED_WITHIN_S if enclosed else 0.0)
        while time.monotonic() < until and leader.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.002)
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _output(folder: Path, limits: CodeLimits) -> tuple[str, str, tuple[str, ...]]:
    """What a process printed, complained of, and was not protected by."""
    most = limits.output_mb * 2**20
    stdout, stderr = _read(folder / _OUT, most), _read(folder / _ERR, most)
    first, _, rest = stderr.partition("\n")
    try:
        missing: Sequence[str] = json.loads(first)
    except ValueError:
        missing, rest = (), stderr
    return stdout, rest, tuple(missing)


def _read(path: Path, most: int) -> str:
    with path.open("rb") as file:
        return file.read(most).decode("utf-8", "replace")


def _ending(status: int | None) -> Ending:
    if status is None:
        return "timed_out"
    if status == 0:
        return "done"
    # Of a process within bubblewrap, a signal is told as shells do.
    signalled = status if status < 0 else 128 - status if status > 128 else 0  # noqa: PLR2004
    by_limit: dict[int, Ending] = {
        -signal.SIGXFSZ: "too_much_output",
        -signal.SIGXCPU: "timed_out",
    }
    return by_limit.get(signalled, "killed" if signalled else "raised")


# -- programs in completions -----------------------------------------------------------------------

_FENCE = re.compile(r"`{3,}|~{3,}")
# What may stand before a fence, and is no part of the lines inside.
_INDENT = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?")
_LANGUAGE = re.compile(r"[\s{.]*([\w+#-]*)")
_LANGUAGES = ("", "python", "py", "python3")
_MAX_CHARACTERS = 100_000
_SPACE_AT_END = re.compile(r"[ \t]+$", re.MULTILINE)


class CodeReward:
    """1.0 if the completion's program passes all tests, else 0.0.

    The program is the last fenced block in Python. What a test may be:

    - a list (or its JSON) of `{"input": ..., "output": ...}`: the program runs once for each, with
      the input on standard input, and must print the output; spaces at line ends don't count;
    - a text: Python statements that raise where it is wrong. They run in an interpreter of their
      own, where names of the program stand for calls of it: it never sees them, and plain data
      comes back. Names of Python's own functions and modules are the real ones there.

    Args:
        limits: Of each run. All runs of one completion share the reward's own time limit, so the
            tests of a completion end at the first that fails.

    Attributes:
        endings: How programs ended, in this process; the reward processes each have their own.
    """

    def __init__(self, limits: CodeLimits = _DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.endings: Counter[str] = Counter()

    def __call__(self, completion: str, tests: str | Sequence[Mapping[str, Any]]) -> float:
        """Run the completion's program.

        Args:
            completion: What the model wrote.
            tests: The dataset's tests.

        Raises:
            ValueError: The dataset has no tests for it.
        """
        cases = _cases(tests)
        program = last_program(completion)
        if program is None:
            self.endings["no_program"] += 1
            return 0.0
        if isinstance(cases, str):
            return float(self._run(program, tests=cases).ending == "done")
        return float(all(self._passes(program, case) for case in cases))

    def _passes(self, program: str, case: Mapping[str, Any]) -> bool:
        result = self._run(program, stdin=str(case["input"]))
        return result.ending in ("done", "exited") and _plain(result.stdout) == _plain(
            str(case["output"])
        )

    def _run(self, program: str, tests: str = "", stdin: str = "") -> CodeResult:
        result = run_python(program, tests, stdin, self.limits)
        self.endings[result.ending] += 1
        return result


def code(completion: str, tests: str | list[dict[str, Any]]) -> float:
    """`CodeReward` with its default limits: 5 s, 512 MB, 1 MB of output, no network.

    Args:
        completion: What the model wrote.
        tests: Statements, or inputs and outputs.
    """
    return CodeReward()(completion, tests)


def last_program(completion: str) -> str | None:
    """The last fenced block that says Python, or says nothing; None if there is none."""
    found = None
    for info, body in _blocks(completion):
        language = _LANGUAGE.match(info)
        if language is not None and language[1].lower() in _LANGUAGES:
            found = body
    return found if found is not None and len(found) <= _MAX_CHARACTERS else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """What each fence says, and what stands between it and the fence that ends it."""
    lines = text.splitlines(keepends=True)
    ends = [_ending_fence(line) for line in lines]
    longest = list(itertools.accumulate(reversed(ends), max, initial=""))[::-1]  # from there on
    fence, info, indent, body = "", "", 0, list[str]()
    for number, line in enumerate(lines):
        if not fence:
            found = _FENCE.search(line)
            if found is not None and "`" not in line[found.end() :] and line.endswith("\n"):
                fence, info, body = found[0], line[found.end() :], []
                before = _INDENT.match(line)
                indent = found.start() if before and before.end() == found.start() else 0
            continue
        last = "" if ends[number].startswith(fence) else None
        if last is None and line.rstrip().endswith(fence) and not longest[number + 1] >= fence:
            last = line.rstrip().rstrip(fence[0])  # the only end there is
        if last is None:
            body.append(_without(line, indent))
            continue
        yield info, textwrap.dedent("".join([*body, last]))
        fence = ""


def _ending_fence(line: str) -> str:
    stripped = line.lstrip(" \t>")
    found = _FENCE.match(stripped)
    return found[0] if found and not re.match(r"[\w`~]", stripped[found.end() :]) else ""


def _without(line: str, indent: int) -> str:
    kept = line[:indent].lstrip(" \t>")
    return kept + line[indent:]


def _cases(tests: str | Sequence[Mapping[str, Any]]) -> str | Sequence[Mapping[str, Any]]:
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        try:
            tests = json.loads(tests)
        except ValueError:
            return tests
    if not tests:
        raise ValueError("the dataset's tests are empty: every program would pass.")
    if not isinstance(tests, str) and not all({"input", "output"} <= set(case) for case in tests):
        raise ValueError("each test of a list must have `input` and `output`.")
    return tests


def _plain(text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return _SPACE_AT_END.sub("", lines).strip("\n")
