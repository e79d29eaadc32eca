"""Puts the configs and the quickstart beside `lightning_grpo/shipped` in the wheel."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("configs", "examples/quickstart/data", "examples/quickstart/model")


class ShippedFiles(BuildHookInterface):
    """An editable install needs none of it: there the names resolve to the repository."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the folders to a wheel proper."""
        if version == "editable":
            return
        for folder in SHIPPED:
            build_data["force_include"][folder] = f"lightning_grpo/shipped/{folder}"
