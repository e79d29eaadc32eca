"""The one place of this package's server code that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ADDRESSES_VARIABLE = "AREAL_LLM_SERVER_ADDRS"


def server_addresses() -> list[str]:
    """Addresses that a launcher left for the trainer: `host:port,host:port`."""
    return [a.strip() for a in os.environ.get(ADDRESSES_VARIABLE, "").split(",") if a.strip()]


def main_address() -> str:
    """Where rank 0 of a process group that somebody else started listens."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top."""
    return {**os.environ, **extra}


def own_package_first() -> dict[str, str]:
    """`PYTHONPATH` that makes a child import the same copy of this package."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != root]
    return {"PYTHONPATH": os.pathsep.join([root, *paths])}


def config_folder() -> Path:
    """Where this user's settings of the package lie."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "lightning_grpo"


def data_folder() -> Path:
    """Where what this package installs for this user lies."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "lightning_grpo"


def visible_devices() -> list[int] | None:
    """The GPUs that `CUDA_VISIBLE_DEVICES` leaves; None where it is not set or names them by id."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    return [int(name) for name in names] if all(n.isdigit() for n in names) else None
