"""One node's process, seen to by an actor: started, looked at, signalled, ended with the actor."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_grpo.servers import supervisor
from lightning_grpo.servers.environment import child_environment

CHUNK_BYTES = 1 << 20


class Node:
    """What an actor does on its node."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._folder = Path(tempfile.mkdtemp(prefix="grpo-"))
        self._log = self._folder / "log"

    def host(self) -> str:
        """The address that other nodes reach this one by."""
        address: str = importlib.import_module("ray.util").get_node_ip_address()
        return address

    def free_port(self) -> int:
        """A port that nobody listens on now."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
            return port

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        """Start the program in `folder`, under a supervisor that ends it with this process."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, "--", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=child_environment(environment),
                cwd=folder,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._pid = int(self._process.stdout.readline().split()[1])

    def look(self, offset: int) -> tuple[int | None, bytes]:
        """The exit status, None while it runs, and output from that byte on (some of it)."""
        assert self._process is not None
        status = self._process.poll()  # before the output: what is read then is all there is
        with self._log.open("rb") as log:
            log.seek(offset)
            return status, log.read(CHUNK_BYTES)

    def signal(self, number: int) -> None:
        """Signal the program, if it runs."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._pid, number)

    def end(self) -> None:
        """End the program and all that it started; returns when they are gone."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(supervisor.GRACE_S + 10.0)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
