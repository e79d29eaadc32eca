"""Functions as tools: their names, their schemas for the chat template, and calls by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from lightning_grpo.agents.tool_calls import ToolCall
from lightning_grpo.agents.tool_process import ToolCounts, ToolLimits, ToolProcesses, ToolResult
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.binding import reward_name as function_name


class ToolBox:
    """The tools of a workflow.

    Args:
        tools: Functions or coroutine functions with type hints and a docstring that describes the
            function and, under `Args:`, each argument.
        limits: Of each call.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], limits: ToolLimits) -> None:
        self.names = [function_name(tool) for tool in tools]
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if not tools or twice:
            what = f"two are named {twice[0]!r}" if twice else "got none"
            raise ConfigError(f"`tools` must be functions of different names, {what}.")
        self.schemas = [_schema(tool) for tool in tools]
        self._processes = ToolProcesses(tools, limits)

    @property
    def counts(self) -> ToolCounts:
        """Calls since the start, by how they ended."""
        return self._processes.counts

    @property
    def missing_protections(self) -> list[str]:
        """Protections that this machine could not give; known after the first call."""
        return self._processes.missing

    def in_use(self) -> AbstractAsyncContextManager[None]:
        """Keep the processes while an episode runs."""
        return self._processes.in_use()

    async def call(self, call: ToolCall) -> ToolResult:
        """What a call comes to; a mistake is a result, too."""
        if call.error:
            return self._refused(call.error)
        if call.name not in self.names:
            return self._refused(f"there is no tool {call.name!r}, only {', '.join(self.names)}")
        return await self._processes.call(self.names.index(call.name), call.arguments)

    def _refused(self, why: str) -> ToolResult:
        self.counts.raised += 1
        return ToolResult("raised", why)


def _schema(tool: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import (
        get_json_schema,
    )  # heavy, and only needed with tools

    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:
        # transformers has errors of its own for what it misses in a signature or docstring.
        raise ConfigError(
            f"tool {function_name(tool)!r} can't be described to the model: {error}. Give every "
            "argument a type hint and a line under `Args:` in the docstring."
        ) from error
    return schema
