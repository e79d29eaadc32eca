"""The Python of the servers' own environment: found, remembered, or explained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from lightning_grpo.errors import ConfigError
from lightning_grpo.servers.environment import config_folder

FILE_NAME = "server-python"


def remember_python(python: Path) -> Path:
    """Makes `python` what "auto" means from now on; returns the file that says so."""
    file = config_folder() / FILE_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{python}\n", encoding="utf-8")
    return file


def remembered_python() -> Path | None:
    """What was remembered, if it is still there."""
    try:
        python = Path((config_folder() / FILE_NAME).read_text(encoding="utf-8").strip())
    except OSError:
        return None
    return python if python.is_file() else None


def resolve_python(python: str) -> str:
    """The interpreter that starts SGLang.

    "auto" is the one that `lightning-grpo install-server` made, else this one if it has SGLang.

    Raises:
        ConfigError: There is none.
    """
    if python != "auto":
        if not Path(python).is_file():
            raise ConfigError(f"`python` must be an interpreter with SGLang, got {python!r}.")
        return python
    remembered = remembered_python()
    if remembered is not None:
        return str(remembered)
    if importlib.util.find_spec("sglang") is not None:
        return sys.executable
    raise ConfigError(
        "SGLang is not installed. Make its environment with `lightning-grpo install-server`, or"
        " name its interpreter in `python`, or use EmbeddedServers (CPU)."
    )
