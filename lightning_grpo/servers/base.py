"""Where inference servers come from, and what the run knows of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from lightning_grpo.errors import ServerError
from lightning_grpo.servers.sizing import ServerLoad

TAIL_LINES = 25
TAIL_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A server that answers.

    Attributes:
        url: `http://host:port`.
        pid: Its process, where it runs on this machine and the run started it.
        log_path: Its output, where the run started it.
        devices: The GPUs that it uses.
    """

    url: str
    pid: int | None = None
    log_path: Path | None = None
    devices: tuple[int, ...] = ()

    def log_tail(self) -> str:
        """The end of its log; empty where there is none."""
        return read_tail(self.log_path) if self.log_path is not None else ""

    def describe(self) -> str:
        """One line: address, process, GPUs, log."""
        parts = [self.url]
        if self.pid is not None:
            parts.append(f"pid {self.pid}")
        if self.devices:
            parts.append("GPU " + ",".join(map(str, self.devices)))
        if self.log_path is not None:
            parts.append(f"log {self.log_path}")
        return "  ".join(parts)


class Servers(ABC):
    """Starts or finds inference servers. Calls block; the caller keeps them off its event loop."""

    api_key: str | None = None
    deterministic: bool = False
    """Whether equal requests must get equal bits; set before `start` by a deterministic run."""
    fits_load: bool = False
    """Whether servers are started to suit what the run will ask of them."""
    load: ServerLoad | None = None
    """What the run will ask; set before `start` where `fits_load`."""

    @abstractmethod
    def start(self, model_path: str, run_dir: Path) -> list[ServerHandle]:
        """Makes the servers answer, with the model of a local folder (or hub id).

        Raises:
            ServerStartError: One did not; none is left running.
            ConfigError: The setting can't work here.
        """

    @property
    @abstractmethod
    def handles(self) -> list[ServerHandle]:
        """The servers that answer now; empty before `start` and after `stop`."""

    @property
    def planned_devices(self) -> tuple[int, ...]:
        """The GPUs, as torch numbers them, that `start` will use; empty if none."""
        return ()

    @property
    def can_restart(self) -> bool:
        """Whether `restart` works."""
        return False

    def restart(self, url: str) -> ServerHandle:
        """Starts the server that had this URL again, with the model of `start`; ends a live one.

        Raises:
            ServerStartError: It does not come up.
        """
        raise ServerError(f"{url} was not started by this run, so it can't be restarted here.")

    def is_gone(self, url: str) -> bool:
        """Whether a silent server has ended, and is not just out of reach; where it can restart."""
        del url
        return True

    @abstractmethod
    def stop(self) -> None:
        """Ends what was started: no process, port or thread is left. May be called twice.

        Also from another thread than `start`, which then fails as soon as it can.
        """

    def describe(self) -> str:
        """One line a server: address, process, GPUs, log."""
        return "\n".join(handle.describe() for handle in self.handles)


def read_tail(path: Path, num_lines: int = TAIL_LINES) -> str:
    """The last lines of a file; empty if it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])
