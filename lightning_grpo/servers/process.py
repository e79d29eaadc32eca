"""Servers that this run starts and ends: their processes, and the embedded engine."""

from __future__ import annotations

import re
import select
import signal
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_grpo.errors import (
    MOST_SAMPLES,
    MOST_SERVERS,
    ServerError,
    ServerStartError,
    require_count,
    require_seconds,
)
from lightning_grpo.keys import API_KEY_VARIABLE, new_key
from lightning_grpo.servers import supervisor
from lightning_grpo.servers.base import (
    Servers,
    child_environment,
    own_package_first,
    wait_until_healthy,
)
from lightning_grpo.serving.server import ServerHandle, read_tail

PROCESS_POLL_S = 0.05
SIGNAL_BASE = 128


CAUSES: tuple[tuple[str, str], ...] = (
    (r"Address already in use", "the port is in use; end whatever listens there"),
    (
        r"No module named '?([\w.]+)",
        "the Python package {0} is missing in the server's environment",
    ),
    (r"CUDA out of memory|OutOfMemoryError", "the GPU's memory is full: lower `memory_fraction`"),
    (
        r"leave no GPU memory for the KV cache",
        "the GPU's memory is taken by others, or `memory_fraction` is too small: raise it",
    ),
    (r"MemoryError|Cannot allocate memory", "the machine's memory is full"),
    (
        r"Repository Not Found|not a valid model identifier|No such file or directory: '([^']*)'"
        r"|[Nn]o file named|does not exist|[Nn]ot a (?:local )?folder"
        r"|Repo id must|HFValidationError",
        "the model path is wrong or incomplete",
    ),
    (r"[Pp]ermission denied", "a file may not be read or written"),
)


def likely_cause(log: str, returncode: int | None) -> str:
    """One phrase on why a start failed; empty when the log tells nothing known."""
    # SGLang kills itself after any failure of its scheduler, and says so.
    itself = "kill_process_tree" in log
    if (returncode == -signal.SIGKILL or "Killed" in log) and not itself:
        return "it was killed, most often for want of memory"
    for pattern, cause in CAUSES:
        if match := re.search(pattern, log):
            return cause.format(*match.groups())
    errors = re.findall(r"^\w*(?:Error|Exception): .+", log, re.MULTILINE) if itself else []
    return str(errors[-1]) if errors else ""


def start_error(what: str, log: str, returncode: int | None = None) -> ServerStartError:
    """The error of a failed start: what happened, the likely cause, the end of the log."""
    cause = likely_cause(log, returncode)
    message = f"{what}." + (f" Likely cause: {cause}." if cause else "")
    return ServerStartError(message + (f"\nThe end of its log:\n{log}" if log else ""))


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
            if said.poll(PROCESS_POLL_S * 1000):
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


class OwnedServers(Servers):
    """What EmbeddedServers and SGLangServers share; they differ in the command only.

    Attributes:
        api_key: What the servers ask for; made at random by `start` unless set before; empty: none.
        host: The name or address that the servers listen on.
        dedicated: Whether the machine is for servers alone: nobody trains on its GPUs.
        start_timeout_s: How long all of them may take to answer.
    """

    host = "127.0.0.1"
    dedicated = False
    start_timeout_s: float

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self._processes: list[ServerProcess] = []
        self._handles: list[ServerHandle] = []
        self._lock = threading.Lock()
        self._stopping = False

    def key_environment(self) -> dict[str, str]:
        """How a server is told its key: a command line is shown to everybody on the machine."""
        # Also an empty one: this process's own variable is for other servers.
        return {API_KEY_VARIABLE: self.api_key or ""}

    def __getstate__(self) -> dict[str, Any]:
        """What a rank that is spawned gets: locks and processes are this process's."""
        return self.__dict__ | {"_lock": None, "_launches": [], "_processes": [], "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In the other process."""
        self.__dict__ |= state | {"_lock": threading.Lock()}

    @abstractmethod
    def launches(self, model_path: str, run_dir: Path) -> Sequence[Launch]:
        """One command for each server.

        Raises:
            ConfigError: They can't run here.
        """

    @property
    def can_restart(self) -> bool:
        """Always: the run owns them."""
        return True

    @property
    def handles(self) -> list[ServerHandle]:
        """The servers, as `start` found or made them."""
        return list(self._handles)

    def start(self, model_path: str, run_dir: Path) -> list[ServerHandle]:
        """Starts all servers at once and waits for each; a failure ends the others."""
        self.stop()
        if self.api_key is None:
            self.api_key = new_key()
        with self._lock:
            self._launches = list(self.launches(model_path, run_dir))
            deadline = time.monotonic() + self.start_timeout_s
            try:
                for launch in self._launches:
                    self._processes.append(ServerProcess(launch))
                    self._heed_stop()
                self._handles = [p.wait_until_ready(deadline) for p in self._processes]
            except BaseException:
                self._end_all()
                raise
            return list(self._handles)

    def restart(self, url: str) -> ServerHandle:
        """Ends what is left of the server at `url` and starts it anew; its URL may change."""
        with self._lock:
            slot = next((i for i, h in enumerate(self._handles) if h.url == url), None)
            if slot is None:
                raise ServerError(f"{url} is none of this run's servers:\n{self.describe()}")
            self._processes[slot].end()
            self._processes[slot] = ServerProcess(self._launches[slot])
            self._heed_stop()
            deadline = time.monotonic() + self.start_timeout_s
            self._handles[slot] = self._processes[slot].wait_until_ready(deadline)
            return self._handles[slot]

    def is_gone(self, url: str) -> bool:
        """Whether the process of the server at `url` has ended."""
        return not any(
            handle.url == url and not process.ended
            for handle, process in zip(self._handles, self._processes, strict=False)
        )

    def stop(self) -> None:
        """Ends every server; returns when all are gone. A start under way fails at once."""
        self._stopping = True
        self._heed_stop()
        with self._lock:
            self._end_all()
            self._stopping = False

    def _heed_stop(self) -> None:
        """Whoever starts a process asks after it: `stop` may have looked before."""
        if self._stopping:
            for process in list(self._processes):
                process.ask_to_end()

    def _end_all(self) -> None:
        for process in self._processes:
            process.ask_to_end()
        for process in self._processes:
            process.end()
        self._processes, self._handles = [], []


class EmbeddedServers(OwnedServers):
    """Starts the package's own CPU engine, which speaks SGLang's HTTP API.

    Args:
        num_servers: How many processes.
        max_running_requests: Requests that one process runs at once.
        start_timeout_s: How long all of them together may take to answer.
    """

    def __init__(
        self,
        num_servers: int = 1,
        max_running_requests: int = 256,
        start_timeout_s: float = 120.0,
    ) -> None:
        super().__init__()
        require_count("num_servers", num_servers, most=MOST_SERVERS)
        require_count("max_running_requests", max_running_requests, most=MOST_SAMPLES)
        require_seconds("start_timeout_s", start_timeout_s)
        self.num_servers = num_servers
        self.max_running_requests = max_running_requests
        self.start_timeout_s = start_timeout_s

    def launches(self, model_path: str, run_dir: Path) -> Sequence[Launch]:
        """The engine's command, once for each server."""
        command = [
            *(sys.executable, "-m", "lightning_grpo.engine"),
            *("--model", model_path, "--host", self.host, "--port", "0", "--exit-with-stdin"),
            *("--max-running-requests", str(self.max_running_requests)),
            *(["--deterministic"] if self.deterministic else []),
        ]
        environment = {"OMP_NUM_THREADS": "1", **own_package_first(), **self.key_environment()}
        return [
            Launch(command, run_dir / "servers" / f"embedded-{slot}.log", environment)
            for slot in range(self.num_servers)
        ]
