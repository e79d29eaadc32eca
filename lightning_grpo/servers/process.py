"""Server processes: environment, devices, ports, waiting for them, starting and stopping."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

from lightning_grpo.errors import ConfigError, ServerError, ServerStartError
from lightning_grpo.keys import API_KEY_VARIABLE, new_key
from lightning_grpo.servers import supervisor
from lightning_grpo.servers.base import ServerHandle, Servers, read_tail

ADDRESSES_VARIABLE = "AREAL_LLM_SERVER_ADDRS"


def server_addresses() -> list[str]:
    """Addresses that a launcher left for the trainer: `host:port,host:port`."""
    return [a.strip() for a in os.environ.get(ADDRESSES_VARIABLE, "").split(",") if a.strip()]


def main_address() -> str:
    """Where rank 0 of a process group that somebody else started listens."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top."""
    return {**os.environ, **extra}


def own_package_first() -> dict[str, str]:
    """`PYTHONPATH` that makes a child import the same copy of this package."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != root]
    return {"PYTHONPATH": os.pathsep.join([root, *paths])}


def config_folder() -> Path:
    """Where this user's settings of the package lie."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "lightning_grpo"


def data_folder() -> Path:
    """Where what this package installs for this user lies."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "lightning_grpo"


def device_names() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: numbers or ids.

    Entry `i` is what torch, and every setting of this package, calls GPU `i`.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return [str(device) for device in machine_devices()]
    names = [name.strip() for name in value.split(",")]
    # The driver, too, reads up to the first name that is none: `-1` hides all.
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def present_devices() -> list[int]:
    """The GPUs that this process may use, numbered as torch numbers them."""
    return list(range(len(device_names())))


def machine_devices() -> list[int]:
    """All GPUs of the machine, by their numbers there.

    Asked of the driver's own tool, since torch is not needed to serve.
    """
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in listed.stdout.split()]


def device_bytes(name: str) -> int:
    """Memory of a GPU, by its number on the machine or its id; 0 where nobody tells."""
    try:
        said = subprocess.run(
            [
                *("nvidia-smi", f"--id={name}", "--query-gpu=memory.total"),
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return int(said.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def serving_devices(present: list[int]) -> list[int]:
    """Half of the GPUs, rounded up, serve, the last ones; one GPU is shared with the trainer."""
    return present[len(present) // 2 :] if len(present) > 1 else present


def training_devices(present: list[int], serving: list[int]) -> list[int]:
    """The GPUs that are left to train; one GPU is shared."""
    if len(present) == 1:
        return present
    return [device for device in present if device not in serving]


def free_ports(count: int, port_range: tuple[int, int], seed: int | None = None) -> list[int]:
    """Ports in `[first, last)` that nothing listens on, tried in random order.

    Two runs that start at the same moment on one machine so rarely pick the same.

    Raises:
        ConfigError: There are not enough.
    """
    candidates = list(range(*port_range))
    random.Random(seed).shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            break
        if is_free(port):
            found.append(port)
    if len(found) < count:
        raise ConfigError(
            f"`port_range` must hold {count} free ports, {port_range[0]} to {port_range[1]} has"
            f" {len(found)}. Give another range."
        )
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen on the port, on every address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


POLL_S = 0.1
KEYS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
CAUSES: tuple[tuple[str, str], ...] = (
    (r"Address already in use", "the port is in use; end whatever listens there"),
    (
        r"No module named '?([\w.]+)",
        "the Python package {0} is missing in the server's environment",
    ),
    (r"CUDA out of memory|OutOfMemoryError", "the GPU's memory is full: lower `memory_fraction`"),
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
    if returncode == -signal.SIGKILL or "Killed" in log:
        return "it was killed, most often for want of memory"
    for pattern, cause in CAUSES:
        if match := re.search(pattern, log):
            return cause.format(*match.groups())
    return ""


def start_error(what: str, log: str, returncode: int | None = None) -> ServerStartError:
    """The error of a failed start: what happened, the likely cause, the end of the log."""
    cause = likely_cause(log, returncode)
    message = f"{what}." + (f" Likely cause: {cause}." if cause else "")
    return ServerStartError(message + (f"\nThe end of its log:\n{log}" if log else ""))


HEALTH = "/health"
"""Wants a token of the server: once it comes, the server is warm."""
LISTENS = "/model_info"
"""Wants nothing: answered also by a server that a run which crashed left paused."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said.

    Attributes:
        status: Of HTTP.
        wait_s: How long it asks to be left alone; 0 where it does not.
    """

    status: int
    wait_s: float = 0.0


def answer(
    url: str, timeout_s: float = 5.0, api_key: str | None = None, path: str = HEALTH
) -> Answer | None:
    """What the server answers to a request for `path`; None: nothing in time, or no HTTP."""
    return asyncio.run(_ask(url + path, timeout_s, api_key))


async def _ask(url: str, timeout_s: float, api_key: str | None) -> Answer | None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # Of the whole exchange: one that drips would outlast any limit between two bytes.
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            asked = response.headers.get("Retry-After", "")
            return Answer(response.status, float(asked) if asked.isdecimal() else 0.0)
    except (aiohttp.ClientError, OSError, ValueError):  # a time-out is an OSError
        return None


def answers(
    url: str, timeout_s: float = 5.0, api_key: str | None = None, path: str = HEALTH
) -> bool:
    """Whether the server answers a request for `path` well."""
    said = answer(url, timeout_s, api_key, path)
    return said is not None and said.status == HTTPStatus.OK


def wait_until_healthy(
    url: str,
    timeout_s: float,
    api_key: str | None = None,
    check: Callable[[], None] = lambda: None,
    path: str = HEALTH,
) -> None:
    """Waits until the server answers.

    Args:
        url: `http://host:port`.
        timeout_s: How long.
        api_key: Sent as a bearer token.
        check: Raises when waiting is pointless (the process has ended).
        path: What is asked for.

    Raises:
        ServerStartError: It does not answer in time.
        ConfigError: It wants another API key.
    """
    deadline = time.monotonic() + timeout_s
    said: Answer | None = None
    while True:
        left_s = deadline - time.monotonic()
        said = answer(url, min(5.0, max(left_s, POLL_S)), api_key, path) or said
        if said is not None and said.status == HTTPStatus.OK:
            return
        check()
        if said is not None and said.status in KEYS:
            wants = "another API key than the one given" if api_key else "an API key"
            raise ConfigError(
                f"{url} wants {wants} (it answered {said.status}). "
                f"Set {API_KEY_VARIABLE} to it, or `api_key` to `env:NAME` or `file:PATH`."
            )
        if left_s <= 0:
            last = "" if said is None else f" It answered {said.status}."
            raise ServerStartError(
                f"Nothing healthy answers at {url} after {timeout_s:g} s.{last}"
                " Start a server there, or correct `urls`."
            )
        time.sleep(max(POLL_S, min(left_s, 0.0 if said is None else said.wait_s)))


PROCESS_POLL_S = 0.05
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
