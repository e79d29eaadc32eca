"""The engine that comes with the package, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.checks import MOST_SAMPLES, MOST_SERVERS, require_count, require_seconds
from lightning_grpo.servers.process import Launch, OwnedServers, own_package_first


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
