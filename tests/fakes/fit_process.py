"""A real `lightning-grpo fit` of a tiny model in a process of its own, to be interrupted."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from tests.fakes.ranks import ROOT

REWARD = """
def reward(completion):
    return float(sum(map(ord, completion)) % 2)
"""


def write_config(folder: Path, model: Path, **data: object) -> None:
    """`tiny.yaml`: two groups of two, for ever; `data` changes the data module's settings."""
    rows = "".join(f'{{"question": "What is {i} + {i}?"}}\n' for i in range(50))
    (folder / "train.jsonl").write_text(rows)
    (folder / "mine.py").write_text(REWARD)
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 100_000},
        "model": {"model": str(model)},
        "data": {
            "prompts": {"path": "train.jsonl", "column": "question"},
            "workflow": {
                "class_path": "lightning_grpo.RLVRWorkflow",
                "init_args": {"reward": "mine.reward", "sampling": {"max_new_tokens": 6}},
            },
            "servers": "lightning_grpo.EmbeddedServers",
            "batch_size": 2,
            "group_size": 2,
            **data,
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


class Fit:
    """`lightning-grpo fit` in a session of its own, with everything that it starts."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder / "tmp"),
        }
        with (folder / "out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightning_grpo.cli.main", "fit", "--config", "tiny.yaml",
                 *arguments],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.family: set[psutil.Process] = set()

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    @property
    def tail(self) -> str:
        return self.output[-1500:]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 100.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, self.tail
            assert self.process.poll() is None, self.tail
            time.sleep(0.02)

    def wait_for_child(self, words: str) -> None:
        """Until something that it has started has these words in its command line."""

        def is_there() -> bool:
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
            running = [p for p in self.family if p.is_running() and p.status() != "zombie"]
            return any(words in " ".join(p.cmdline()) for p in running)

        self.wait_until(is_there)

    def handles(self, number: signal.Signals) -> bool:
        """Whether the process has a handler of its own for a signal."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*([0-9a-f]+)", status)[1], 16)
        return bool(caught >> (number - 1) & 1)

    def wait_for(self, text: str, timeout_s: float = 100.0) -> None:
        self.wait_until(lambda: re.search(text, self.output) is not None, timeout_s)
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def those(self, words: str) -> list[psutil.Process]:
        """What runs now of all that it started, with these words in its command line."""
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        found = []
        for process in self.family:
            try:
                if words in " ".join(process.cmdline()) and process.status() != "zombie":
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def cut_connections(self) -> int:
        """Shut down every connection that it has at this moment, as a broken network does."""
        get_descriptor = 438  # the number of the system call `pidfd_getfd`
        handle, num_cut = os.pidfd_open(self.process.pid), 0
        for connection in psutil.Process(self.process.pid).net_connections("tcp"):
            if connection.status != psutil.CONN_ESTABLISHED:
                continue
            copy = ctypes.CDLL(None).syscall(get_descriptor, handle, connection.fd, 0)
            if copy < 0:
                continue
            try:
                end = socket.socket(fileno=copy)
            except OSError:  # the number is another file's by now
                os.close(copy)
                continue
            with end, contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                num_cut += 1
        os.close(handle)
        return num_cut

    def fill_disk(self, full: bool) -> None:
        """No file of it or of what it started can have more than 64 KiB; or all can again.

        So what it prints is still written: a checkpoint and weights are not.
        """
        for process in [psutil.Process(self.process.pid), *self.those("")]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
                process.rlimit(psutil.RLIMIT_FSIZE, (1 << 16 if full else hard, hard))

    def kill_everything(self) -> None:
        """SIGKILL to the trainer and to all that it started, at once."""
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        self.process.kill()
        kill(*self.family)
        self.process.wait()

    def end(self, *signals: int, pause_s: float = 0.3) -> tuple[int, float]:
        """Send signals; exit status, and seconds since the last one."""
        for index, number in enumerate(signals):
            if index:
                time.sleep(pause_s)
            self.process.send_signal(number)
        sent = time.monotonic()
        status = self.process.wait(timeout=60)
        return status, time.monotonic() - sent

    def survivors(self, timeout_s: float = 10.0) -> list[psutil.Process]:
        """What it started and left behind; a moment is granted to the engine's supervisor."""
        _, alive = psutil.wait_procs(self.family, timeout=timeout_s)
        return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def kill(*processes: psutil.Process) -> None:
    """SIGKILL to those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def left_behind(folder: Path, timeout_s: float = 10.0) -> list[str]:
    """What was started from a folder, or by what was, and still runs after a moment's grace."""
    mark, end = str(folder / "tmp"), time.monotonic() + timeout_s
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == mark and process.status() != "zombie":
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Fit]:
    fit = Fit(folder, *arguments)
    try:
        yield fit
    finally:
        if fit.process.poll() is None:
            os.killpg(fit.process.pid, signal.SIGKILL)
            fit.process.wait()
        kill(*fit.survivors(timeout_s=5.0))
