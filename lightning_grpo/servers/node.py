"""What runs on a server node: starts, restarts and ends servers as the trainer asks."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_grpo.errors import GRPOError, ServerError
from lightning_grpo.servers.base import ServerHandle
from lightning_grpo.servers.mailbox import BEAT_S, POLL_S, NodeMailbox, Request
from lightning_grpo.servers.owned import OwnedServers
from lightning_grpo.servers.sizing import ServerLoad


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

    def _answer(self, request: Request) -> None:
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
