"""Requests and replies as files of a folder that several machines share.

A file appears whole (it is renamed into place), is read once, and only by its owner: one of them
holds the servers' key, and a node starts what it is asked to. Nobody needs to be reachable by
network, and clocks need not agree: whether a node is alive is seen by its beats changing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ServerStartError

POLL_S = 0.2
BEAT_S = 1.0
SILENCE_S = 60.0
"""A node whose beats stand still for so long is lost."""

END = "end"
"""A file of this name in the folder ends the nodes."""


@dataclass(frozen=True)
class Request:
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

    def requests(self) -> Iterator[Request]:
        """What was asked since the last call, in order."""
        for file in sorted(self._folder.glob(f"ask-{self._node}-*.json")):
            content = _read(file)
            if content is not None and file.name not in self._seen:
                self._seen.add(file.name)
                yield Request(file.stem.partition("ask-")[2], **content)

    def reply(self, request: Request, content: dict[str, Any]) -> None:
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
