"""The one place where the command line reads and sets environment variables."""

from __future__ import annotations

import os
import sys

TRACEBACK = "LIGHTNING_GRPO_TRACEBACK"
"""Set to anything but 0, errors keep their tracebacks."""


_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Set by launchers: Lightning's, torchrun, srun."""


def prepare_imports() -> None:
    """Make files of the current folder importable and torch's C++ quiet, also in children.

    Ranks, reward workers and engines inherit `PYTHONPATH`, so `reward: my_rewards.f` means the
    same in all of them.
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if here not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *folders])
    # Its warnings are about its own tear-down, such as memory that a stopped server had mapped.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks in place of messages."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and makes the run's folder."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def set_one_thread_default() -> bool:
    """Give this process and its children one compute thread each, unless the user chose.

    Returns:
        Whether the default was set (then torch, already loaded, must be told too).
    """
    if "OMP_NUM_THREADS" in os.environ:
        return False
    os.environ["OMP_NUM_THREADS"] = "1"
    return True


def silence_jsonargparse() -> None:
    """Hide that Lightning 2.6 calls jsonargparse 4.53 by deprecated names: not the user's fault."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
