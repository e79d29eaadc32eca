"""Leak checks around every test: threads, child processes, environment variables."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

GRACE_S = 5.0
"""What a test started may take this long to end by itself."""

LONG_LIVED_THREADS = ("QueueFeederThread", "TMonitor", "ExecutorManagerThread", "pymp-", "Dummy-")
"""Name parts of threads that a library keeps for the whole process."""

LONG_LIVED_CHILDREN = ("resource_tracker", "forkserver", "--type=")
"""Parts of the command line of helpers that multiprocessing and loky keep for the process, and of
those that a browser starts when it likes and ends with itself."""

RANKS = "rank_forkserver.py"
"""Part of the command line of ranks, and of what they are forked from, which stays."""

SET_BY_LIBRARIES = {
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_MODULE_LOADING", "GROUP_RANK", "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "NODE_RANK", "OMP_NUM_THREADS", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK", "RANK",
    "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_CACHE_DIR", "TORCH_CPP_LOG_LEVEL",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH", "WORLD_SIZE",
}  # fmt: skip
"""Restored after each test like the rest, but no fault of the test."""


def pytest_collection_finish() -> None:
    """Spare the collector a million objects of imports and tests, none of which becomes garbage.

    Each of its looks at everything would take half a second; a run of a few steps has two.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Hypothesis, which may be imported now, asks the collector who refers to what."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """A test that sets a variable and leaves it fails; the environment is put back either way."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    leaked = sorted(changed - SET_BY_LIBRARIES)
    assert not leaked, f"environment variables changed and not put back: {leaked}"


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """A test that leaves a thread running fails."""
    before = {thread.ident for thread in threading.enumerate()}
    yield
    leaked = _left_after_grace(
        lambda: [
            thread.name
            for thread in threading.enumerate()
            if thread.ident not in before
            and not any(part in thread.name for part in LONG_LIVED_THREADS)
        ]
    )
    assert not leaked, f"threads still running: {leaked}"


@pytest.fixture(autouse=True)
def no_leaked_processes() -> Iterator[None]:
    """A test that leaves a child process running fails; the child is killed."""
    before = _descendants(os.getpid())
    yield
    leaked = _left_after_grace(
        lambda: [pid for pid in _descendants(os.getpid()) - before if _is_ours(pid)]
    )
    for pid in leaked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not leaked, f"child processes still running (now killed): {leaked}"


def _descendants(pid: int) -> set[int]:
    """Children and theirs, as the kernel lists them; psutil reads every process that there is."""
    children: set[int] = set()
    with contextlib.suppress(OSError):  # the process has ended, below: the thread
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                told = Path(f"/proc/{pid}/task/{task}/children").read_text()
                children.update(map(int, told.split()))
    return children.union(*map(_descendants, children))


def _is_ours(pid: int) -> bool:
    try:
        child = psutil.Process(pid)
        command = " ".join(child.cmdline())
        is_rank = RANKS in command and child.ppid() != os.getpid()
        return child.status() != psutil.STATUS_ZOMBIE and (
            is_rank or not any(part in command for part in LONG_LIVED_CHILDREN)
        )
    except psutil.NoSuchProcess:
        return False


def _left_after_grace(find):
    """What `find` still finds once the grace time is over; returns early when it finds nothing."""
    deadline = time.monotonic() + GRACE_S
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture(autouse=True)
def no_leaked_process_group() -> Iterator[None]:
    """A test that leaves a process group behind fails; those after it must not run inside it."""
    yield
    if _leave_process_group():
        pytest.fail("the default process group is still there: take `ends_its_group`")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Only the one that the package runs on, also where a tool has brought Trio along."""
    return "asyncio"


@pytest.fixture
def ends_its_group() -> Iterator[None]:
    """For a strategy that makes a process group in this process, which Lightning never ends."""
    yield
    _leave_process_group()


def _leave_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported: no group either
    left = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if left:
        distributed.destroy_process_group()
    return left


@pytest.fixture
def process_group() -> Iterator[None]:
    """One rank, without a socket."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
