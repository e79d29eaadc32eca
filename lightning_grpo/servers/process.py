"""One server process under a supervisor: started, awaited, watched, ended."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_grpo.errors import ServerStartError
from lightning_grpo.servers import supervisor
from lightning_grpo.servers.base import ServerHandle, read_tail
from lightning_grpo.servers.environment import child_environment
from lightning_grpo.servers.waiting import start_error, wait_until_healthy

POLL_S = 0.05
SIGNAL_BASE = 128


@dataclass(frozen=True)
class Launch:
    """How to start one server.

    Attributes:
        command: The program and its arguments.
        log_path: Where its output goes, behind what is there.
        environment: On top of this process's.
        url: Where it will listen; None: it prints `READY <url>` on its standard output.
        devices: The GPUs that it uses.
    """

    command: Sequence[str]
    log_path: Path
    environment: Mapping[str, str]
    url: str | None = None
    devices: tuple[int, ...] = ()


class ServerProcess:
    """A server that this process owns; ends with it, however it ends."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        launch.log_path.parent.mkdir(parents=True, exist_ok=True)
        awaited = ["--ready"] if launch.url is None else []
        with launch.log_path.open("ab") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, *awaited, "--", *launch.command],
                bufsize=0,  # of what waits in a buffer, `poll` knows nothing
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=child_environment(launch.environment),
                start_new_session=True,
            )
        self._pid: int | None = None

    def wait_until_ready(self, deadline: float) -> ServerHandle:
        """Waits until the server answers.

        Args:
            deadline: By `time.monotonic`.

        Raises:
            ServerStartError: It ended, or did not answer in time; it is ended then.
        """
        try:
            self._pid = self._read_pid()
            url = self.launch.url or self._await_ready_line(deadline)
            wait_until_healthy(url, max(0.1, deadline - time.monotonic()), check=self._check_alive)
        except ServerStartError as error:
            self.end()
            log = self._own_log()
            raise (error if log in str(error) else start_error(str(error), log)) from None
        except BaseException:
            self.end()
            raise
        return ServerHandle(url, self._pid, self.launch.log_path, self.launch.devices)

    @property
    def ended(self) -> bool:
        """Whether it runs no more, by itself or because it was ended."""
        return self._supervisor.poll() is not None

    def ask_to_end(self) -> None:
        """Has the supervisor end the server and all that it started."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()

    def end(self) -> None:
        """Ends the server and all that it started; returns when they are gone."""
        assert self._supervisor.stdout is not None
        self.ask_to_end()
        try:
            self._supervisor.wait(supervisor.GRACE_S + 10.0)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self._supervisor.stdout.close()

    def _read_pid(self) -> int:
        assert self._supervisor.stdout is not None
        line = self._supervisor.stdout.readline().decode()
        if not line.startswith("PID "):
            self._supervisor.wait()
            raise start_error(f"{self.launch.command[0]} could not be started", self._own_log())
        return int(line.split()[1])

    def _await_ready_line(self, deadline: float) -> str:
        assert self._supervisor.stdout is not None
        said = select.poll()  # `select` itself takes no descriptor above 1,023
        said.register(self._supervisor.stdout, select.POLLIN)
        while True:
            if said.poll(POLL_S * 1000):
                line = self._supervisor.stdout.readline()
                if line.startswith(supervisor.READY):
                    return line.removeprefix(supervisor.READY).decode().strip()
                self._supervisor.wait()  # the pipe is closed: it ends
            self._check_alive()
            if time.monotonic() > deadline:
                raise ServerStartError("The server was not ready in time")

    def _check_alive(self) -> None:
        returncode = self._supervisor.poll()
        if returncode is not None:
            raise start_error(
                f"The server ended with status {returncode} while it started",
                self._own_log(),
                # The supervisor reports a signal as a shell does.
                SIGNAL_BASE - returncode if returncode > SIGNAL_BASE else returncode,
            )

    def _own_log(self) -> str:
        return read_tail(self.launch.log_path)
