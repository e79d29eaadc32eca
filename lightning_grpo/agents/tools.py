"""Tools: functions with schemas, and the calls that a completion makes.

They run in processes that can be killed: each call has limits of time, memory, output and files.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import secrets
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
import cloudpickle

from lightning_grpo.agents.tool_worker import most_bytes
from lightning_grpo.errors import A_YEAR_S, MOST, ConfigError, require_number
from lightning_grpo.rewards.confine import Confinement
from lightning_grpo.rewards.sandbox import ScratchFolder, bubblewrap, end_group
from lightning_grpo.rollout.chat import Tokenizer
from lightning_grpo.rollout.scoring import reward_name as function_name

_LENGTH = struct.Struct("=I")
# All that a tool sees of the environment, unless `ToolLimits.environment` names more.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
_START_TIMEOUT_S = 60.0
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lightning_grpo.agents.tool_worker import main; main()"
)

Kind = Literal["value", "raised", "too_long", "timed_out", "killed"]


_MOST = {"timeout_s": A_YEAR_S, "memory_mb": 1 << 24, "output_mb": 1 << 20, "processes": 4096}


@dataclass(frozen=True)
class ToolLimits:
    """What a tool may use. It may write to a scratch folder only, emptied after each call.

    Each call runs in a fork of a process that has loaded the tools: what one leaves in memory is
    gone at the next.

    Args:
        timeout_s: Wall time of one call; its process is killed then.
        memory_mb: Memory beyond what loading the tools took.
        output_mb: Size of what it prints, and of any file that it writes.
        result_characters: Longest result that is given to the policy.
        network: Whether tools may open network sockets (search, an API).
        processes: How many tools run at once.
        environment: Names of variables that tools are to see beside `PATH`, `HOME` and the
            language; a key that one needs, which the policy may then get to see, too.
    """

    timeout_s: float = 10.0
    memory_mb: int = 1024
    output_mb: int = 16
    result_characters: int = 4096
    network: bool = False
    processes: int = 2
    environment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse limits that nothing could run under."""
        for field in fields(self):
            if field.name not in ("network", "environment"):
                require_number(
                    f"limits.{field.name}",
                    vars(self)[field.name],
                    above=0,
                    most=_MOST.get(field.name, MOST),
                    whole=field.name != "timeout_s",
                )


@dataclass
class ToolCounts:
    """Calls of tools since the start.

    Attributes:
        value: Calls that gave a result.
        raised: Calls that raised, a refused write, fork or connection included.
        too_long: Calls whose result was too long.
        timed_out: Calls whose process was killed for its time.
        killed: Calls whose process a limit ended (output, memory), or that ended by itself.
    """

    value: int = 0
    raised: int = 0
    too_long: int = 0
    timed_out: int = 0
    killed: int = 0


@dataclass(frozen=True)
class ToolResult:
    """What came of a call, in words for the policy."""

    kind: Kind
    text: str


class ToolProcesses:
    """Runs tools; started by the first episode that needs one, ended with the last.

    Args:
        tools: Functions or coroutine functions, shipped once to each process.
        limits: Of each call.

    Attributes:
        counts: Of calls.
        missing: Protections that this machine could not give, known after the first start.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], limits: ToolLimits) -> None:
        self.counts = ToolCounts()
        self.missing: list[str] = []
        self._tools = list(tools)
        self._limits = limits
        self._users = 0
        self._idle: list[_Worker] = []
        self._slots = asyncio.Semaphore(limits.processes)

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Keep the processes while an episode runs."""
        if not self._users:
            self._slots = asyncio.Semaphore(self._limits.processes)  # of this event loop
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                idle, self._idle = self._idle, []
                with anyio.CancelScope(shield=True):
                    for worker in idle:
                        await worker.end()

    async def call(self, tool: int, arguments: Mapping[str, Any]) -> ToolResult:
        """Call one tool; whatever it does, there is a result.

        Raises:
            ConfigError: The tools can't be loaded in a process of their own.
        """
        async with self._slots:
            worker = self._idle.pop() if self._idle else await self._start()
            result: ToolResult | None = None
            try:
                with anyio.move_on_after(self._limits.timeout_s) as scope:
                    result = await worker.call({"tool": tool, "arguments": dict(arguments)})
                if scope.cancelled_caught:
                    result = ToolResult("timed_out", f"ended after {self._limits.timeout_s:g} s")
            finally:
                # Also where the episode was cancelled: nobody knows what the process is doing.
                if result is not None and result.kind not in ("timed_out", "killed"):
                    self._idle.append(worker)
                else:
                    with anyio.CancelScope(shield=True):
                        await worker.end()
        assert result is not None
        setattr(self.counts, result.kind, vars(self.counts)[result.kind] + 1)
        return result

    async def _start(self) -> _Worker:
        worker = await _Worker.start(self._tools, self._limits)
        self.missing = worker.missing
        return worker


class _Worker:
    """One process, between its start and its end."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        folder: tempfile.TemporaryDirectory[str],
        limits: ToolLimits,
    ) -> None:
        self.missing: list[str] = []
        self._process = process
        self._folder = folder
        self._most_bytes = most_bytes(limits.result_characters) + 4096

    @classmethod
    async def start(cls, tools: Sequence[Callable[..., Any]], limits: ToolLimits) -> _Worker:
        folder = ScratchFolder(prefix="tools-", ignore_cleanup_errors=True)
        scratch = Path(folder.name, "scratch")
        await anyio.to_thread.run_sync(scratch.mkdir)
        wrapper = await anyio.to_thread.run_sync(
            functools.partial(bubblewrap, str(scratch), network=limits.network)
        )
        printed = os.open(Path(folder.name, "printed"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *wrapper,
                sys.executable,
                "-c",
                _START,
                json.dumps(sys.path),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=printed,
                cwd=scratch,
                env=_environment(limits),
                start_new_session=True,
            )
        finally:
            os.close(printed)
        worker = cls(process, folder, limits)
        orders = {
            "parent": None if wrapper else os.getpid(),
            "tools": [cloudpickle.dumps(tool) for tool in tools],
            "most_characters": limits.result_characters,
            "confinement": Confinement(
                limits.memory_mb, None, limits.output_mb, str(scratch), network=limits.network
            ),
        }
        try:
            with anyio.fail_after(_START_TIMEOUT_S):
                answer = await worker._exchange(cloudpickle.dumps(orders))
            if answer["kind"] != "ready":
                raise ConfigError(f"the tools can't be loaded in a process: {answer['text']}")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await worker.end()
            raise
        worker.missing = json.loads(answer["text"])
        return worker

    async def call(self, message: Mapping[str, Any]) -> ToolResult:
        wanted = secrets.token_hex(8)
        answer = await self._exchange(json.dumps({**message, "id": wanted}).encode())
        if answer.get("id") != wanted:
            return ToolResult("killed", "its process sent what is no answer, and was ended")
        return ToolResult(answer["kind"], answer["text"])

    async def end(self) -> None:
        await anyio.to_thread.run_sync(end_group, self._process.pid)
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
        await anyio.to_thread.run_sync(self._folder.cleanup)

    async def _exchange(self, body: bytes) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(_LENGTH.pack(len(body)) + body)
            await stdin.drain()
            (length,) = _LENGTH.unpack(await stdout.readexactly(_LENGTH.size))
            if length <= self._most_bytes:
                answer: dict[str, Any] = json.loads(await stdout.readexactly(length))
                return answer
        except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError, ValueError):
            return {"kind": "killed", "text": "the process of the tools is gone"}
        return {"kind": "killed", "text": "its process sent what is no answer, and was ended"}


def _environment(limits: ToolLimits) -> dict[str, str]:
    variables = os.environ  # noqa: TID251 - what the tools' processes get of it
    names = (*_ENVIRONMENT, *limits.environment)
    return {name: variables[name] for name in names if name in variables}


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
