"""Puts the configs, the page of metrics and the quickstart beside `lightning_grpo/shipped`."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = (
    "configs",
    "docs/metrics.md",
    "examples/quickstart/data",
    "examples/quickstart/model",
)


class ShippedFiles(BuildHookInterface):
    """An editable install needs none of it: there the names resolve to the repository."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds them to a wheel proper."""
        if version == "editable":
            return
        for path in SHIPPED:
            build_data["force_include"][path] = f"lightning_grpo/shipped/{path}"
