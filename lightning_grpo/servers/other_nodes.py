"""Servers on other nodes: Slurm steps and Ray actors, by a mailbox in a folder.

Requests and replies as files of a folder that several machines share.

A file appears whole (it is renamed into place), is read once, and only by its owner: one of them
holds the servers' key, and a node starts what it is asked to. Nobody needs to be reachable by
network, and clocks need not agree: whether a node is alive is seen by its beats changing.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_grpo.errors import (
    MOST_SERVERS,
    GRPOError,
    ServerError,
    ServerStartError,
    require_count,
    require_seconds,
)
from lightning_grpo.keys import new_key
from lightning_grpo.servers.base import ServerLoad, Servers
from lightning_grpo.servers.process import OwnedServers
from lightning_grpo.servers.sglang import SGLangServers
from lightning_grpo.serving.server import ServerHandle

POLL_S = 0.2
BEAT_S = 1.0
SILENCE_S = 60.0
"""A node whose beats stand still for so long is lost."""

END = "end"
"""A file of this name in the folder ends the nodes."""


@dataclass(frozen=True)
class NodeRequest:
    """Something that a node is asked to do."""

    number: str
    what: str
    arguments: dict[str, Any]


class NodeMailbox:
    """A node's side.

    Args:
        folder: Shared by all machines; made if missing.
        node: Which node this is, from 0.
        host: The name that others reach it by.
    """

    def __init__(self, folder: Path, node: int, host: str) -> None:
        self._folder, self._node, self._host = folder, node, host
        self._beats = 0
        self._seen: set[str] = set()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def beat(self) -> None:
        """Say that this node is there."""
        self._beats += 1
        _write(_node_file(self._folder, self._node), {"host": self._host, "beat": self._beats})

    @property
    def ended(self) -> bool:
        """Whether the job script has said that nobody will ask any more."""
        return (self._folder / END).exists()

    def requests(self) -> Iterator[NodeRequest]:
        """What was asked since the last call, in order."""
        for file in sorted(self._folder.glob(f"ask-{self._node}-*.json")):
            content = _read(file)
            if content is not None and file.name not in self._seen:
                self._seen.add(file.name)
                yield NodeRequest(file.stem.partition("ask-")[2], **content)

    def reply(self, request: NodeRequest, content: dict[str, Any]) -> None:
        """Answer it."""
        _write(self._folder / f"reply-{request.number}.json", content)


class TrainerMailbox:
    """The trainer's side.

    Args:
        folder: Shared by all machines.
        num_nodes: How many nodes there are to be.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._folder, self._num_nodes = folder, num_nodes
        self._run, self._count = uuid.uuid4().hex[:8], 0
        self._beats: dict[int, tuple[int, float]] = {}

    def wait_for_nodes(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Wait until every node has said that it is there.

        Raises:
            ServerStartError: One has not.
        """
        deadline = time.monotonic() + timeout_s
        while missing := [n for n in range(self._num_nodes) if self._node(n) is None]:
            check()
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"server node {missing[0]} did not appear in {self._folder} within "
                    f"{timeout_s:g} s. Each needs `lightning-grpo launch server-node`; the folder "
                    "must be the same, on a file system that all nodes share."
                )
            time.sleep(POLL_S)

    def ask(self, node: int, what: str, **arguments: Any) -> str:
        """Ask a node for something; returns the number to wait for."""
        self._count += 1
        # Sorted by name in the order of asking.
        number = f"{node}-{time.time_ns():020d}-{self._run}-{self._count:04d}"
        _write(self._folder / f"ask-{number}.json", {"what": what, "arguments": arguments})
        return number

    def answered(self, number: str) -> dict[str, Any] | None:
        """The reply, once it is there.

        Raises:
            ServerStartError: The node fell silent.
        """
        content = _read(self._folder / f"reply-{number}.json")
        if content is not None:
            for name in (f"reply-{number}.json", f"ask-{number}.json"):
                (self._folder / name).unlink(missing_ok=True)
            return content
        self._require_alive(int(number.partition("-")[0]))
        return None

    def _require_alive(self, node: int) -> None:
        found, now = self._node(node), time.monotonic()
        beat = -1 if found is None else int(found["beat"])
        known, since = self._beats.get(node, (-2, now))
        self._beats[node] = (beat, now if beat != known else since)
        if now - self._beats[node][1] > SILENCE_S:
            host = "" if found is None else f" ({found['host']})"
            raise ServerStartError(f"server node {node}{host} is silent for {SILENCE_S:g} s.")

    def _node(self, node: int) -> dict[str, Any] | None:
        return _read(_node_file(self._folder, node))


def _node_file(folder: Path, node: int) -> Path:
    return folder / f"node-{node}.json"


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as written:
        json.dump(content, written)
    partial.replace(file)


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a file that may not be there yet."""
    with contextlib.suppress(FileNotFoundError, OSError):
        content: dict[str, Any] = json.loads(file.read_text())
        return content
    return None


class ServerNode:
    """One server node.

    Args:
        folder: Shared with the trainer.
        node: Which one, from 0.
        host: The name that others reach it by; its servers listen there.
    """

    def __init__(self, folder: Path, node: int, host: str) -> None:
        self._mailbox = NodeMailbox(folder, node, host)
        self._node, self._host = node, host
        self._servers: OwnedServers | None = None

    def serve(self, end: threading.Event) -> None:
        """Do what is asked until `end`, then end the servers."""
        beat_at = 0.0
        # Threads: a stop must reach a start under way.
        with ThreadPoolExecutor(4, thread_name_prefix="node") as threads:
            try:
                while not (end.wait(POLL_S) or self._mailbox.ended):
                    if time.monotonic() > beat_at:
                        self._mailbox.beat()
                        beat_at = time.monotonic() + BEAT_S
                    for request in self._mailbox.requests():
                        threads.submit(self._answer, request)
            finally:
                self._stop()

    def _answer(self, request: NodeRequest) -> None:
        try:
            handles = self._do(request.what, request.arguments)
        except Exception as error:  # noqa: BLE001 - the trainer is told, whatever it was
            said = str(error) if isinstance(error, GRPOError) else repr(error)
            self._mailbox.reply(request, {"error": said})
            return
        found = [{"url": h.url, "log_path": str(h.log_path)} for h in handles]
        self._mailbox.reply(request, {"handles": found})

    def _do(self, what: str, arguments: Mapping[str, Any]) -> list[ServerHandle]:
        if what == "start":
            self._stop()
            self._servers = build_servers(arguments["servers"])
            self._servers.host = self._host
            self._servers.dedicated = True
            self._servers.api_key = arguments.get("api_key")
            self._servers.deterministic = bool(arguments.get("deterministic"))
            self._servers.tells_routes = bool(arguments.get("tells_routes"))
            if arguments.get("load"):
                self._servers.load = ServerLoad(**arguments["load"])
            run_dir = Path(arguments["run_dir"]) / f"node-{self._node}"
            return self._servers.start(arguments["model_path"], run_dir)
        if what == "restart" and self._servers is not None:
            return [self._servers.restart(arguments["url"])]
        if what == "look" and self._servers is not None:
            url = arguments["url"]
            running = [] if self._servers.is_gone(url) else self._servers.handles
            return [handle for handle in running if handle.url == url]
        self._stop()
        return []

    def _stop(self) -> None:
        if self._servers is not None:
            self._servers.stop()


def build_servers(described: Mapping[str, Any]) -> OwnedServers:
    """The servers that `describe_servers` described."""
    module, _, name = str(described["class_path"]).rpartition(".")
    arguments = dict(described["init_args"])
    if "port_range" in arguments:  # JSON has no tuples
        arguments["port_range"] = tuple(arguments["port_range"])
    kind = getattr(importlib.import_module(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, OwnedServers)):
        raise ServerError(f"{described['class_path']} is no class of servers that a node starts.")
    return kind(**arguments)


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
        shares = {
            name: -(-getattr(self.load, name) // self.num_nodes) for name in ("in_flight", "batch")
        }
        return asdict(replace(self.load, **shares))

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
            "deterministic": self.deterministic,
            "tells_routes": self.tells_routes,
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


class RayServers(NodeServers):
    """Servers on the nodes that `lightning-grpo launch ray` has placed for them.

    Each server node starts `servers` when the trainer asks, on all of its GPUs; the trainer learns
    the URLs through a folder that all nodes share.

    Args:
        num_nodes: Server nodes.
        folder: Shared by all nodes; a new one for each start of the run.
        servers: What every server node starts; None is `SGLangServers()`.
        connect_timeout_s: How long the nodes may take to appear.
    """


class SlurmServers(NodeServers):
    """Servers on other nodes of the job that `lightning-grpo launch slurm` writes.

    Each server node starts `servers` when the trainer asks, on all of its GPUs; the trainer learns
    the URLs through a folder that all nodes share.

    Args:
        num_nodes: Server nodes.
        folder: Shared by all nodes; a new one for each job, and each time it is requeued.
        servers: What every server node starts; None is `SGLangServers()`.
        connect_timeout_s: How long the nodes may take to appear.
    """
