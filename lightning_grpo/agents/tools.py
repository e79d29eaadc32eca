"""Tools: functions with schemas, and the calls that a completion makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from lightning_grpo.agents.tool_process import ToolCounts, ToolLimits, ToolProcesses, ToolResult
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.chat import Tokenizer
from lightning_grpo.rollout.scoring import reward_name as function_name

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]*)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
_SHOWN = 200


@dataclass(frozen=True)
class ToolCall:
    """One call that a completion asks for.

    Attributes:
        name: Of the tool.
        arguments: By name.
        error: Why it can't be read as a call; empty where it can.
    """

    name: str
    arguments: Mapping[str, Any]
    error: str = ""


@dataclass(frozen=True)
class ParsedReply:
    """A completion as an assistant's message: its words without the calls, and the calls."""

    content: str
    calls: tuple[ToolCall, ...] = ()


ParseReply = Callable[[str], ParsedReply]
"""Reads a completion's text, special tokens included."""


def reply_parser(
    tokenizer: Tokenizer, schemas: Sequence[Mapping[str, Any]], prefix: str = ""
) -> ParseReply:
    """How this tokenizer's model writes calls: its own `parse_response`, else its template's form.

    Args:
        tokenizer: Of the model.
        schemas: The tools, as JSON schemas.
        prefix: The text before the completion; templates may begin the answer themselves.

    Raises:
        ConfigError: The template knows no tools.
    """
    own: Any = tokenizer
    if getattr(own, "response_template", None):
        return lambda text: _parsed(own, text, prefix, schemas)
    template = str(tokenizer.chat_template or "")
    if _OPEN in template and "<function=" in template:
        return lambda text: _tagged(text, _read_function)
    if _OPEN in template:
        return lambda text: _tagged(text, _read_json)
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return _whole_reply
    raise ConfigError(
        "the tokenizer states no form of tool calls: it has no `response_template`, and its chat "
        "template holds none that is known here. Use a model that was trained on tools, or pass "
        "`parse`, a function from a completion's text to `ParsedReply`."
    )


def strip_specials(tokenizer: Tokenizer, text: str) -> str:
    """A decoded text without the mark that ends it."""
    for mark in getattr(tokenizer, "all_special_tokens", ()):
        text = text.removesuffix(mark)
    return text


def _parsed(
    tokenizer: Any, text: str, prefix: str, schemas: Sequence[Mapping[str, Any]]
) -> ParsedReply:
    try:
        message = tokenizer.parse_response(text, prefix=prefix, tools=list(schemas))
    except Exception as error:  # noqa: BLE001 - whatever the policy wrote; told to it
        return ParsedReply(text, (_unreadable(text, str(error)[:_SHOWN]),))
    calls = []
    for call in message.get("tool_calls") or ():
        if not isinstance(call, Mapping):
            calls.append(_unreadable(str(call), "it must be an object"))
            continue
        function = call.get("function", call)
        calls.append(_call(function.get("name"), function.get("arguments"), str(call)))
    content = message.get("content")
    return ParsedReply(text if content is None and not calls else str(content or ""), tuple(calls))


def _tagged(text: str, read: Callable[[str], ToolCall]) -> ParsedReply:
    first, *rest = text.split(_OPEN)
    calls, words = [], [first]
    for part in rest:
        inside, closed, after = part.partition(_CLOSE)
        words.append(after)
        calls.append(read(inside) if closed else _unreadable(inside, f"`{_CLOSE}` is missing"))
    return ParsedReply("".join(words).strip() if calls else text, tuple(calls))


def _read_json(text: str) -> ToolCall:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _unreadable(text, f"it is not valid JSON ({error})")
    if not isinstance(call, dict):
        return _unreadable(text, "it must be an object with `name` and `arguments`")
    return _call(call.get("name"), call.get("arguments", call.get("parameters")), text)


def _read_function(text: str) -> ToolCall:
    match = _FUNCTION.fullmatch(text)
    if match is None:
        return _unreadable(text, "it must be `<function=name>` ... `</function>`")
    arguments = {name: _value(value) for name, value in _PARAMETER.findall(match[2])}
    return _call(match[1].strip(), arguments, text)


def _whole_reply(text: str) -> ParsedReply:
    stripped = text.strip().removeprefix("<|python_tag|>").strip()
    if not (stripped.startswith("{") and '"name"' in stripped):
        return ParsedReply(text)
    return ParsedReply("", (_read_json(stripped),))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _call(name: Any, arguments: Any, text: str) -> ToolCall:
    if isinstance(arguments, str):  # some models write the arguments as JSON in a string
        arguments = _value(arguments)
    if not isinstance(name, str) or not name:
        return _unreadable(text, "`name` is missing")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        return ToolCall(name, {}, f"`arguments` must be an object, got {str(arguments)[:_SHOWN]}")
    return ToolCall(name, dict(arguments))


def _unreadable(text: str, why: str) -> ToolCall:
    return ToolCall("", {}, f"the call can't be read: {why}, in {text.strip()[:_SHOWN]!r}")


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
