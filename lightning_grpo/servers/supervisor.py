"""Runs a command and ends all of it with its parent: `python -I supervisor.py -- command`.

Standard library only. The command runs in its own session, so that a terminal's Ctrl-C does not
reach it. Its process group, and whatever it started that got away into groups of its own, ends when
the supervisor's standard input closes (the parent ended, however), on SIGTERM, when the parent is
gone, and when the command itself ends. The first line on standard output is `PID <number>`, the
command's; the command's own output goes to standard error, which the parent points at a log file.
With `--ready` before the `--` its first line that begins with `READY` goes to standard output, too:
the parent hears of its own command alone, whoever else writes to that log.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

GRACE_S = 5.0
POLL_S = 0.2
RELAY_S = 1.0
READY = b"READY "
SET_PARENT_DEATH_SIGNAL = 1
SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """Runs the command after `--` and returns its exit status."""
    end_of_own = arguments.index("--")
    command, awaits_ready = arguments[end_of_own + 1 :], "--ready" in arguments[:end_of_own]
    asked_to_stop: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked_to_stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    # Orphans of the command become children of this process, and so can be found.
    prctl(SET_CHILD_SUBREAPER, 1)
    parent = os.getppid()
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # closes with this process: the command may watch it
        stdout=subprocess.PIPE if awaits_ready else sys.stderr,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    os.write(1, f"PID {child.pid}\n".encode())
    relay = threading.Thread(target=relay_output, args=(child,), daemon=True)
    relay.start()
    while child.poll() is None and not asked_to_stop and os.getppid() == parent:
        if stdin_closed():
            break
    returncode = end(child)
    relay.join(RELAY_S)  # what got away from it may hold its output open for longer
    return returncode


def relay_output(child: subprocess.Popen[bytes]) -> None:
    """Copies the command's standard output to the log, and its first `READY` line to the parent."""
    told = False
    for line in child.stdout or ():  # to its end, since a full pipe would stop the command
        write_all(2, line)
        if line.startswith(READY) and not told:
            told = True
            write_all(1, line)


def write_all(descriptor: int, data: bytes) -> None:
    """Writes what can be written: neither a full disk nor a parent that left stops the relay."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        return


def stdin_closed() -> bool:
    """Waits a moment; True once nobody holds the other end of standard input."""
    readable, _, _ = select.select([0], [], [], POLL_S)
    return bool(readable) and not os.read(0, 4096)


def end(child: subprocess.Popen[bytes]) -> int:
    """Asks the command's group to end, then ends it, and every orphan it left."""
    deadline = time.monotonic() + GRACE_S
    if child.poll() is None:
        signal_group(child.pid, signal.SIGTERM)
        if child.stdin is not None:
            child.stdin.close()
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    signal_group(child.pid, signal.SIGKILL)
    returncode = child.wait()
    while orphans := children():
        for pid in orphans:
            kill_and_reap(pid)
    return returncode if returncode >= 0 else 128 - returncode


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signals the group that `pid` leads; a group that is gone is no error."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def children() -> list[int]:
    """Processes whose parent is this one."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def kill_and_reap(pid: int) -> None:
    """Ends one child that is not the command."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def die_with_parent() -> None:
    """In the child: the kernel ends it should this supervisor be killed."""
    prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    """Linux's process control; elsewhere there is none, and standard input must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
