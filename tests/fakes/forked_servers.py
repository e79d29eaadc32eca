"""Embedded servers that are ready in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_grpo.servers.process import EmbeddedServers, Launch
from tests.fakes.rank_forkserver import python_with_imports


class ForkedServers(EmbeddedServers):
    """Begin with their imports done, which saves seconds each.

    What is killed is a process that stands for the engine, with which it ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._python = python_with_imports()  # now: it may be started by another process

    def launches(self, model_path: str, run_dir: Path) -> Sequence[Launch]:
        own = super().launches(model_path, run_dir)
        return [replace(each, command=[*self._python, *each.command[1:]]) for each in own]
