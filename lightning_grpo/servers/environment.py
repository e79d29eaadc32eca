"""The one place of this package's server code that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ADDRESSES_VARIABLE = "AREAL_LLM_SERVER_ADDRS"


def server_addresses() -> list[str]:
    """Addresses that a launcher left for the trainer: `host:port,host:port`."""
    return [a.strip() for a in os.environ.get(ADDRESSES_VARIABLE, "").split(",") if a.strip()]


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top."""
    return {**os.environ, **extra}


def own_package_first() -> dict[str, str]:
    """`PYTHONPATH` that makes a child import the same copy of this package."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != root]
    return {"PYTHONPATH": os.pathsep.join([root, *paths])}
