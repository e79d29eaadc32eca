"""Servers whose processes are a few lines of Python: they start in no time and answer anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.servers.process import Launch, OwnedServers

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("loading", *sys.argv[1:], flush=True)
print(f"READY http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


class PythonServers(OwnedServers):
    """Runs a program once for each server."""

    def __init__(
        self, code: str = SERVER, num_servers: int = 1, start_timeout_s: float = 20.0
    ) -> None:
        super().__init__()
        self.code, self.num_servers, self.start_timeout_s = code, num_servers, start_timeout_s

    def launches(self, model_path: str, run_dir: Path) -> Sequence[Launch]:
        command = [sys.executable, "-u", "-c", self.code]
        command += ["tells-routes"] if self.tells_routes else []
        command += ["deterministic"] if self.deterministic else []
        return [
            Launch(command, run_dir / "servers" / f"{slot}.log", {})
            for slot in range(self.num_servers)
        ]
