"""Processes that begin with their imports done, which take seconds: forks of this program.

    process = forked([script, "an argument"], environment, folder, out)
    subprocess.Popen(python_with_imports("-m", "lightning_grpo.engine", "--model", folder))

A fork runs the script or module as its main one, in a session of its own. What it forks from is
started with the first of them, and ends with the tests.
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
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.fakes import fork_client
from tests.fakes.fork_client import NUMBER, ask_for_fork, told

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "lightning_grpo.module",
    "lightning_grpo.datamodule",
    "lightning_grpo.strategies.fsdp2",
    "lightning_grpo.engine.openai",
    "lightning_grpo.engine.updates",
    "tests.fakes.tiny_model",
)
_MOST_BYTES = 2**18
_starting = threading.Lock()


class Fork:
    """What `subprocess.Popen` is, of a process that another one started.

    Args:
        connection: Where its process id is told, and then its exit status.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = told(connection)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            self.returncode = told(self._connection)
            self._connection.close()
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
    with open(os.devnull, "rb") as nothing:
        streams = nothing.fileno(), out.fileno(), out.fileno()
        return Fork(ask_for_fork(_origin(origin), argv, environment, str(folder), streams))


def python_with_imports(*argv: str) -> list[str]:
    """The command of a process that is a fork's other self: it gets its signals and ends with it.

    Args:
        argv: A script, or `-m` and a module, and its arguments.
    """
    return [sys.executable, "-SE", fork_client.__file__, _origin(0), *argv]


def _origin(number: int) -> str:
    """The name of the socket where a process that runs this file is asked for forks."""
    with _starting:  # whichever thread comes first
        return _started_origin(number)


@functools.cache
def _started_origin(number: int) -> str:
    name = f"lightning-grpo-tests-{os.getpid()}-{number}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            },
        )
    atexit.register(process.communicate)  # closes its input, which ends it
    return name


def main() -> None:
    """Fork whenever that is asked for; in a fork, run what was."""
    sys.path[0] = str(ROOT)  # not the folder of this file: its names would hide real modules
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # so that forks share its pages
    if not Origin(socket.socket(fileno=int(sys.argv[1]))).becomes_fork():
        return
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


class Origin:
    """Forks this process for whoever asks.

    Args:
        listener: Where they do.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._forks: dict[socket.socket, tuple[int, int]] = {}  # by who asked: handle, process id
        for each in (0, listener):
            self._selector.register(each, selectors.EVENT_READ)

    def becomes_fork(self) -> bool:
        """Returns True in a fork, or False when the tests have ended."""
        while True:
            for key, _ in self._selector.select():
                if key.fd == 0:
                    return False
                if key.data in self._forks:
                    self._heed(key)
                elif key.fileobj is self._listener and self._forks_for(*self._listener.accept()):
                    return True

    def _forks_for(self, connection: socket.socket, _: Any) -> bool:
        order, streams, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
        if (pid := os.fork()) == 0:
            for each in (self._selector, self._listener, connection, *self._forks):
                each.close()
            for handle, _ in self._forks.values():
                os.close(handle)
            _become(json.loads(order), streams)
            return True
        for stream in streams:
            os.close(stream)
        connection.send(NUMBER.pack(pid))
        handle = os.pidfd_open(pid)
        self._forks[connection] = handle, pid
        for each in (handle, connection):
            self._selector.register(each, selectors.EVENT_READ, connection)
        return False

    def _heed(self, key: selectors.SelectorKey) -> None:
        """A fork has ended, or who asked for it has gone."""
        self._selector.unregister(key.fileobj)
        connection: socket.socket = key.data
        handle, pid = self._forks[connection]
        if key.fileobj is connection:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            return
        del self._forks[connection]
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        with contextlib.suppress(ConnectionError):
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.send(NUMBER.pack(status))
        connection.close()
        os.close(handle)


def _become(order: dict[str, Any], streams: Sequence[int]) -> None:
    """Make this fork what a new process would be."""
    from lightning.pytorch.utilities import rank_zero_only

    os.setsid()
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    rank_zero_only.rank = int(os.environ.get("RANK", "0"))  # Lightning reads it when imported
    sys.argv = order["argv"]


if __name__ == "__main__":
    main()
