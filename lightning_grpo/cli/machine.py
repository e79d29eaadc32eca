"""What `doctor` looks at of a machine, and under `srun` of several."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from lightning_grpo.servers.base import device_names, machine_devices

_CORES, _MEMORY_GB, _DISK_GB, _FILES, _SKEW_S = 2, 4, 5, 4096, 2.0
_SHARED_WAIT_S = 60.0
_INSTALL = "install it again, from the checkout: pip install -c constraints.txt -e ."

Verdict = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the doctor's.

    Attributes:
        check: What was looked at.
        verdict: `ok`, `warning` or `failure`.
        found: What was seen.
        way_out: What to do about it; empty where all is well.
    """

    check: str
    verdict: Verdict
    found: str
    way_out: str = ""


Check = Callable[[], Iterator[CheckResult]]


def packages() -> Iterator[CheckResult]:
    """Versions, against what this package asks for."""
    wrong = []
    for text in metadata.requires("lightning-grpo") or ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version}, expected {need.specifier}")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
    about = f"Python {platform.python_version()}, {shown}"
    if wrong:
        yield CheckResult("packages", "failure", "; ".join(wrong), _INSTALL)
    else:
        yield CheckResult("packages", "ok", about)


def machine() -> Iterator[CheckResult]:
    """Cores, memory, open files, shared memory."""
    import resource

    cores, memory = len(os.sched_getaffinity(0)), free_memory() / 2**30
    few = cores < _CORES or memory < _MEMORY_GB
    yield CheckResult(
        "machine",
        "warning" if few else "ok",
        f"{cores} CPU cores, {memory:.0f} GiB of memory free",
        f"a run wants {_CORES} cores and {_MEMORY_GB} GiB" if few else "",
    )
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < _FILES:
        yield CheckResult(
            "open files", "warning", f"at most {most}", f"ulimit -Hn {_FILES} before the run"
        )
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").is_dir() else 0.0
    if device_names() and shared < 1.0:
        yield CheckResult(
            "shared memory", "warning", f"/dev/shm has {shared:.1f} GiB free",
            "in a container: --shm-size 16g, or --ipc host",
        )  # fmt: skip


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine has free, or what is left of a container's limit.

    Args:
        cgroup: Where the kernel says what the container may take (version 2).
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or none with a limit ("max")
        return free


def gpus() -> Iterator[CheckResult]:
    """What the driver has, and what torch sees of it."""
    import torch

    present, hidden = machine_devices(), os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not present and not count:
        yield CheckResult("GPUs", "ok", "none: EmbeddedServers train small models on the CPU")
    elif not count:
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}" if built else "torch is a build for CPUs"
        if hidden is not None:
            why += f"; CUDA_VISIBLE_DEVICES={hidden!r}"
        yield CheckResult(
            "GPUs", "failure", f"the driver has {len(present)}, torch sees none: {why}",
            "install the torch that pytorch.org names for this driver",
        )  # fmt: skip
    for index in range(count):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        taken = free < 0.9 * total
        yield CheckResult(
            "GPUs",
            "warning" if taken else "ok",
            f"{index}: {torch.cuda.get_device_name(index)}, {free:.0f} of {total:.0f} GiB free",
            "another program has the rest: see nvidia-smi" if taken else "",
        )


def network() -> Iterator[CheckResult]:
    """Loopback, on which trainer and servers of one machine talk."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address, timeout=5.0):
            pass
    yield CheckResult("network", "ok", "loopback works")


def disk(folder: Path, needed_gb: float = _DISK_GB) -> Iterator[CheckResult]:
    """Room where the run writes, and the clock of that file system."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free / 1e9
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            skew = os.stat(file.name).st_mtime - time.time()
    except OSError as error:
        yield CheckResult(
            "disk", "failure", f"{place} can't be written to: {error.strerror}",
            "set trainer.default_root_dir to a folder that can",
        )  # fmt: skip
        return
    enough = free >= needed_gb
    yield CheckResult(
        "disk",
        "ok" if enough else "failure",
        f"{free:.0f} GB free in {place}" + ("" if enough else f", {needed_gb:.0f} GB are needed"),
        "" if enough else "free some, or set trainer.default_root_dir to another disk",
    )
    if abs(skew) > _SKEW_S:
        yield CheckResult(
            "clock", "warning", f"{place} is {skew:+.0f} s away from this machine's clock",
            "run an NTP client on both: checkpoints are ordered by time",
        )  # fmt: skip


def nodes() -> Iterator[CheckResult]:
    """Under `srun`: whether ranks see each other's files, and talk over their process group."""
    rank, count = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    job = f"{os.environ.get('SLURM_JOB_ID')}-{os.environ.get('SLURM_STEP_ID')}"
    mine = Path.cwd() / f".doctor-{job}-{rank}"
    mine.touch()
    try:
        deadline, seen = time.monotonic() + _SHARED_WAIT_S, 0
        while seen < count and time.monotonic() < deadline:
            seen = len(list(Path.cwd().glob(f".doctor-{job}-*")))
            time.sleep(0.2)
        shared = seen == count
        yield CheckResult(
            "shared folder",
            "ok" if shared else "failure",
            f"rank {rank} on {socket.gethostname()} sees the files of {seen} of {count} ranks",
            "" if shared else f"{Path.cwd()} must be one folder on all nodes: start elsewhere",
        )
        yield from process_group(rank, count)  # behind it all have looked
    finally:
        mine.unlink(missing_ok=True)


def process_group(rank: int, count: int) -> Iterator[CheckResult]:
    """Whether the ranks of a Slurm step add up a tensor."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = SLURMEnvironment()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(slurm.local_rank() % torch.cuda.device_count())
    backend = "nccl" if cuda else "gloo"
    began = time.monotonic()
    dist.init_process_group(
        backend,
        init_method=f"tcp://{slurm.main_address}:{slurm.main_port}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_SHARED_WAIT_S),
    )
    try:
        ones = torch.ones(1 << 20, device="cuda" if cuda else "cpu")
        dist.all_reduce(ones)
        right = bool((ones == count).all())
    finally:
        dist.destroy_process_group()
    seconds = time.monotonic() - began
    yield CheckResult(
        "ranks",
        "ok" if right else "failure",
        f"{count} ranks added up over {backend} in {seconds:.1f} s",
        "" if right else "set NCCL_SOCKET_IFNAME to the network between the nodes",
    )
