"""Servers that the run starts itself: all at once, restarted one by one, ended together."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ServerError
from lightning_grpo.keys import API_KEY_VARIABLE, new_key
from lightning_grpo.servers.base import ServerHandle, Servers
from lightning_grpo.servers.process import Launch, ServerProcess


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
