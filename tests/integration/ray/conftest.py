"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.fakes.ranks import ROOT


@pytest.fixture(autouse=True)
def no_leaked_processes() -> None:
    """Ray keeps idle workers; the cluster ends them, and each test looks for its own processes."""


class RayCluster:
    """Nodes of two CPUs each, as `ray start` makes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.address = ""
        self.add("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={folder}/ray")
        self.address = self.wait_for(0, r"--address='([^']+)'")
        self.add(f"--address={self.address}")
        self.wait_for(1, "Ray runtime started")

    def add(self, *options: str) -> None:
        """Start one more node."""
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=2", "--block"]
        with self.log(len(self.nodes)).open("wb") as log:
            self.nodes.append(
                subprocess.Popen(
                    [*command, "--num-gpus=0", "--disable-usage-stats", *options],
                    env={**environment, "RAY_DISABLE_IMPORT_WARNING": "1"},
                    cwd=self.folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def log(self, node: int) -> Path:
        """Where a node's own output goes."""
        return self.folder / f"node-{node}.log"

    def wait_for(self, node: int, pattern: str) -> str:
        """Wait for a line of a node; its first group, if it has one."""
        end = time.monotonic() + 90
        while not (found := re.search(pattern, self.log(node).read_text())):
            assert time.monotonic() < end, self.log(node).read_text()
            assert self.nodes[node].poll() is None, self.log(node).read_text()
            time.sleep(0.1)
        return found[found.re.groups]

    def kill(self, node: int) -> None:
        """The machine is gone: SIGKILL to everything on that node."""
        process = psutil.Process(self.nodes[node].pid)
        for each in [*process.children(recursive=True), process]:
            each.kill()
        self.nodes[node].wait()


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    if find_spec("ray") is None:  # not imported here: it changes the environment
        pytest.skip("needs the extra [ray]")
    folder = Path(tempfile.mkdtemp(prefix="grpo-ray-", dir="/tmp"))  # Ray's sockets: short paths
    made = RayCluster(folder)
    try:
        yield made
    finally:
        for node in range(len(made.nodes)):
            if made.nodes[node].poll() is None:
                made.kill(node)
        shutil.rmtree(folder, ignore_errors=True)
