"""Processes that begin with the imports of a rank done, which take seconds: forks of this program.

    process = forked([script, "an argument"], environment, folder, out)

A fork runs the script as its main module, in a session of its own. What it forks from is started
with the first of them, and ends with the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "lightning_grpo.module",
    "lightning_grpo.datamodule",
    "lightning_grpo.strategies.fsdp2",
    "tests.fakes.tiny_model",
)
_MOST_BYTES = 2**18
_NUMBER = struct.Struct("=i")


class Fork:
    """What `subprocess.Popen` is, of a process that another one started.

    Args:
        told: A pipe out of which its process id comes, and then its exit status.
    """

    def __init__(self, told: int) -> None:
        self._told = told
        (self.pid,) = _NUMBER.unpack(os.read(told, _NUMBER.size))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._told, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            (self.returncode,) = _NUMBER.unpack(os.read(self._told, _NUMBER.size))
            os.close(self._told)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(
    argv: Sequence[str], environment: Mapping[str, str], folder: Path, out: IO[bytes], origin: int
) -> Fork:
    """Start a process that runs the script `argv[0]`.

    Args:
        argv: The script and its arguments.
        environment: All of its variables.
        folder: Where it runs.
        out: Its standard output and error.
        origin: Which process to fork from. Forks of one also share the seed of Python's hashes, and
            ranks must not agree because of that.
    """
    order = {"argv": [*argv], "environment": {**environment}, "folder": str(folder)}
    reading, writing = os.pipe()
    socket.send_fds(_origin(origin), [json.dumps(order).encode()], [out.fileno(), writing])
    os.close(writing)
    return Fork(reading)


@functools.cache
def _origin(number: int) -> socket.socket:
    """The connection to a process that runs this file."""
    ours, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(its.fileno()), str(number)],
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        },
    )
    its.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def main() -> None:
    """Fork whenever that is asked for; in a fork, run what was."""
    sys.path[0] = str(ROOT)  # not the folder of this file: its names would hide real modules
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # so that forks share its pages
    if script := _next_script(socket.socket(fileno=int(sys.argv[1]))):
        runpy.run_path(script, run_name="__main__")


def _next_script(connection: socket.socket) -> str | None:
    """Returns in a fork, or with None when the tests have ended."""
    told: dict[int, tuple[int, int]] = {}  # handle of a fork: its process id, its pipe
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in told:
                    selector.unregister(key.fd)
                    _tell_the_end(key.fd, *told.pop(key.fd))
                    continue
                body, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, 2)
                if not body:
                    return None
                out, pipe = descriptors
                if (pid := os.fork()) == 0:
                    connection.close()
                    for descriptor in (pipe, *told, *(p for _, p in told.values())):
                        os.close(descriptor)
                    return _become(json.loads(body), out)
                os.close(out)
                os.write(pipe, _NUMBER.pack(pid))
                handle = os.pidfd_open(pid)
                told[handle] = pid, pipe
                selector.register(handle, selectors.EVENT_READ)


def _tell_the_end(handle: int, pid: int, pipe: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, _NUMBER.pack(status))
    os.close(pipe)
    os.close(handle)


def _become(order: dict[str, Any], out: int) -> str:
    """Make this fork what a new process would be. Returns the script to run."""
    from lightning.pytorch.utilities import rank_zero_only

    os.setsid()
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.close(out)
    rank_zero_only.rank = int(os.environ.get("RANK", "0"))  # Lightning reads it when imported
    sys.argv = order["argv"]
    return sys.argv[0]


if __name__ == "__main__":
    main()
