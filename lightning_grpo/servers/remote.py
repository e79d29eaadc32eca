"""Servers on other nodes of the same job, reached through a folder that all nodes share."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_grpo.checks import MOST_SERVERS, require_count, require_seconds
from lightning_grpo.errors import ServerError, ServerStartError
from lightning_grpo.keys import new_key
from lightning_grpo.servers.base import ServerHandle, Servers
from lightning_grpo.servers.mailbox import POLL_S, SILENCE_S, TrainerMailbox
from lightning_grpo.servers.owned import OwnedServers
from lightning_grpo.servers.sglang import SGLangServers

STOP_TIMEOUT_S = 30.0


class NodeServers(Servers):
    """Has each server node of the job start servers, and brings their URLs to the trainer.

    On each server node runs `lightning-grpo launch server-node --folder FOLDER`, which starts what
    it is asked to and ends it with itself.

    Args:
        num_nodes: Server nodes.
        folder: Shared by all nodes; a new one for each job, and each time it is begun again.
        servers: What every server node starts; None is `SGLangServers()`.
        connect_timeout_s: How long the nodes may take to appear.
    """

    def __init__(
        self,
        num_nodes: int = 1,
        folder: str = "runs/servers",
        servers: OwnedServers | None = None,
        connect_timeout_s: float = 600.0,
    ) -> None:
        require_count("num_nodes", num_nodes, most=MOST_SERVERS)
        require_seconds("connect_timeout_s", connect_timeout_s)
        self.num_nodes = num_nodes
        self.folder = folder
        self.servers = servers or SGLangServers()
        self.connect_timeout_s = connect_timeout_s
        self._mailbox: TrainerMailbox | None = None
        self._handles: list[tuple[int, ServerHandle]] = []
        self._stopping = threading.Event()

    def _node_load(self) -> dict[str, Any] | None:
        """Each node's part of the load, as JSON has it."""
        if self.load is None:
            return None
        return asdict(replace(self.load, in_flight=-(-self.load.in_flight // self.num_nodes)))

    @property
    def fits_load(self) -> bool:  # type: ignore[override]
        """As what the nodes start."""
        return self.servers.fits_load

    @property
    def can_restart(self) -> bool:
        """Always: the nodes own them."""
        return True

    @property
    def handles(self) -> list[ServerHandle]:
        """The servers of all nodes; without GPUs, whose numbers are those of other machines."""
        return [handle for _, handle in self._handles]

    def start(self, model_path: str, run_dir: Path) -> list[ServerHandle]:
        """Asks every node for its servers and waits for all."""
        self.stop()
        self._stopping.clear()
        if self.api_key is None:
            self.api_key = new_key()
        self._mailbox = TrainerMailbox(Path(self.folder).absolute(), self.num_nodes)
        self._mailbox.wait_for_nodes(self.connect_timeout_s, self._check_stopping)
        request = {
            "model_path": _shared(model_path),
            "run_dir": str(run_dir.absolute()),
            "servers": describe_servers(self.servers),
            "load": self._node_load(),
            "api_key": self.api_key,
        }
        asked = [self._mailbox.ask(node, "start", **request) for node in range(self.num_nodes)]
        limit_s = self.servers.start_timeout_s + STOP_TIMEOUT_S
        try:
            for node, number in enumerate(asked):
                reply = self._wait(number, limit_s)
                self._handles += [(node, _handle(each)) for each in reply["handles"]]
        except BaseException:
            self.stop()
            raise
        return self.handles

    def restart(self, url: str) -> ServerHandle:
        """Has the node start the server at `url` again; its URL may change."""
        at = next((i for i, (_, handle) in enumerate(self._handles) if handle.url == url), None)
        if at is None or self._mailbox is None:
            raise ServerError(f"{url} is none of this run's servers:\n{self.describe()}")
        node = self._handles[at][0]
        number = self._mailbox.ask(node, "restart", url=url)
        reply = self._wait(number, self.servers.start_timeout_s + STOP_TIMEOUT_S)
        self._handles[at] = (node, _handle(reply["handles"][0]))
        return self._handles[at][1]

    def is_gone(self, url: str) -> bool:
        """Whether the process at `url` has ended, as its node says; False if the node is silent."""
        node = next((node for node, handle in self._handles if handle.url == url), None)
        if node is None or self._mailbox is None:
            return True
        try:
            return not self._wait(self._mailbox.ask(node, "look", url=url), SILENCE_S)["handles"]
        except ServerStartError:
            return False

    def stop(self) -> None:
        """Has every node end its servers; the nodes themselves end with their job."""
        self._stopping.set()
        mailbox, self._mailbox, self._handles = self._mailbox, None, []
        if mailbox is not None:
            self._stop_nodes(mailbox)

    def _stop_nodes(self, mailbox: TrainerMailbox) -> None:
        asked = [mailbox.ask(node, "stop") for node in range(self.num_nodes)]
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for number in asked:
            while time.monotonic() < deadline:
                try:
                    if mailbox.answered(number) is not None:
                        break
                except ServerStartError:
                    break  # a lost node has no servers of ours
                time.sleep(POLL_S)

    def _wait(self, number: str, timeout_s: float) -> Mapping[str, Any]:
        assert self._mailbox is not None
        mailbox, deadline = self._mailbox, time.monotonic() + timeout_s
        while (reply := mailbox.answered(number)) is None:
            self._check_stopping()
            if time.monotonic() > deadline:
                node = number.partition("-")[0]
                raise ServerStartError(f"server node {node} did not answer in {timeout_s:g} s.")
            time.sleep(POLL_S)
        if "error" in reply:
            raise ServerStartError(f"on server node {number.partition('-')[0]}: {reply['error']}")
        return reply

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise ServerStartError("The start of the servers was given up.")


def describe_servers(servers: OwnedServers) -> dict[str, Any]:
    """Class and arguments as JSON has them, for `build_servers` elsewhere."""
    names = [n for n in inspect.signature(type(servers).__init__).parameters if n != "self"]
    return {
        "class_path": f"{type(servers).__module__}.{type(servers).__qualname__}",
        "init_args": {name: vars(servers)[name] for name in names},
    }


def _shared(model_path: str) -> str:
    """A local folder by its absolute path; a hub id as it is."""
    return str(Path(model_path).absolute()) if Path(model_path).exists() else model_path


def _handle(fields: Mapping[str, Any]) -> ServerHandle:
    return ServerHandle(fields["url"], log_path=Path(fields["log_path"]))
