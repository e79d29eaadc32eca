"""Real ranks for tests: N processes on loopback, each running one module-level function.

    with start_ranks(function, 2, "an argument") as ranks:
        ranks.kill(1, signal.SIGSTOP)
        results = ranks.join(timeout_s=30)

Every process runs `function(*args)` in its own session, with the environment that torch and
Lightning expect of a launched rank, and with both imported already. Nothing is left behind when the
block is left.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.rank_forkserver import ROOT, Fork, forked


@dataclass(frozen=True)
class RankResult:
    rank: int
    returncode: int | None  # None: it had to be killed at the end
    value: Any
    output: str  # stdout and stderr


class Ranks:
    def __init__(self, folder: Path, processes: list[Fork]) -> None:
        self.folder = folder
        self.processes = processes

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        self.processes[rank].send_signal(signum)

    def output(self, rank: int) -> str:
        return (self.folder / f"out.{rank}").read_text(errors="replace")

    def wait_for(self, text: str, rank: int = 0, timeout_s: float = 100.0) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.output(rank):
            if time.monotonic() > end or self.processes[rank].poll() is not None:
                raise AssertionError(f"rank {rank} never printed {text!r}:\n{self.output(rank)}")
            time.sleep(0.02)

    def join(self, ranks: list[int] | None = None, timeout_s: float = 50.0) -> list[RankResult]:
        """Wait for these ranks (all of them); one that is still there then has no return code."""
        end = time.monotonic() + timeout_s
        chosen = range(len(self.processes)) if ranks is None else ranks
        for rank in chosen:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[rank].wait(timeout=max(0.0, end - time.monotonic()))
        return [self._result(rank) for rank in chosen]

    def _result(self, rank: int) -> RankResult:
        path = self.folder / f"value.{rank}"
        value = pickle.loads(path.read_bytes()) if path.exists() else None
        return RankResult(rank, self.processes[rank].poll(), value, self.output(rank))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def start_launcher(function: Callable[..., Any], *args: Any) -> Iterator[Ranks]:
    """One process without a rank, as a user's script is: Lightning starts the other ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_job(folder, function, args)
        process = _start(folder, 0, {"MASTER_PORT": str(free_port())})
        try:
            yield Ranks(folder, [process])
        finally:
            with contextlib.suppress(ProcessLookupError):  # its own session: all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def start_ranks(function: Callable[..., Any], world_size: int = 2, *args: Any) -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_job(folder, function, args)
        port = str(free_port())
        processes = [
            _start(folder, rank, _rank_environment(rank, world_size, port))
            for rank in range(world_size)
        ]
        try:
            yield Ranks(folder, processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def run_ranks(
    function: Callable[..., Any], world_size: int = 2, *args: Any, timeout_s: float = 50.0
) -> list[Any]:
    """Run it on every rank and return what it returned; any failure fails the test."""
    with start_ranks(function, world_size, *args) as ranks:
        results = ranks.join(timeout_s=timeout_s)
    for result in results:
        assert result.returncode == 0, f"rank {result.rank}: {result.returncode}\n{result.output}"
    return [result.value for result in results]


def init_gloo() -> tuple[int, int]:
    """Inside a rank: the default process group from the environment; (rank, world size)."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def _write_job(folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    source = Path(sys.modules[function.__module__].__file__)
    (folder / "job").write_bytes(pickle.dumps((str(source), function.__qualname__, args)))


def _rank_environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _start(folder: Path, rank: int, environment: dict[str, str]) -> Fork:
    env = {
        **os.environ,
        **environment,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    with (folder / f"out.{rank}").open("wb") as out:
        return forked(
            [str(Path(__file__).resolve()), str(folder), str(rank)], env, folder, out, rank % 2
        )


def _main(folder: Path, rank: int) -> None:
    source, qualname, args = pickle.loads((folder / "job").read_bytes())
    spec = importlib.util.spec_from_file_location("rank_job", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_job"] = module
    spec.loader.exec_module(module)
    function: Any = module
    for part in qualname.split("."):
        function = getattr(function, part)
    value = function(*args)
    part_path = folder / f"value.{rank}.part"
    part_path.write_bytes(pickle.dumps(value))
    part_path.rename(folder / f"value.{rank}")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not the folder of this file: its names would hide real modules
    _main(Path(sys.argv[1]), int(sys.argv[2]))
