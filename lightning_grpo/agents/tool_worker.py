"""The inside of a tool process: loads the tools, and runs each call in a fork of its own.

Messages are a length in four bytes and that many bytes. The first holds the pickled orders; then
each is a JSON object `{"id", "tool": index, "arguments": {...}}`, answered by `{"id", "kind",
"text"}`. A fork is confined, has no descriptor of this exchange, and ends with its call: nothing
that a tool leaves behind (in a module, on a descriptor) is there at the next one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from lightning_grpo.rewards.confine import Confinement, confine, die_with_parent

_LENGTH = struct.Struct("=I")
_TRACEBACK_CHARACTERS = 2000
_BYTES_PER_CHARACTER = 12  # JSON's worst: a pair of surrogates, escaped


def most_bytes(characters: int) -> int:
    """The longest answer with a result of that many characters."""
    return characters * _BYTES_PER_CHARACTER + 4096


def main() -> None:
    """Serves until standard input closes."""
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what tools print; its size is limited, and it is emptied after each call
    orders = cloudpickle.loads(_receive(incoming))
    if orders["parent"] is not None:
        die_with_parent(orders["parent"])
    try:
        tools = [cloudpickle.loads(blob) for blob in orders["tools"]]
    except BaseException:  # noqa: BLE001 - told to the parent as text
        _send(outgoing, {"kind": "error", "text": traceback.format_exc()[-_TRACEBACK_CHARACTERS:]})
        return
    limits: Confinement = orders["confinement"]
    most = orders["most_characters"]
    forked = functools.partial(_in_fork, limits=limits, private=(incoming, outgoing), most=most)
    _send(outgoing, forked(None))
    while message := _receive(incoming):
        call = json.loads(message)
        work = functools.partial(_answer, tools[call["tool"]], call["arguments"], most)
        answer = forked(work)
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)
        _empty(Path(limits.scratch))
        _send(outgoing, {**answer, "id": call["id"]})


def _in_fork(
    work: Callable[[], dict[str, str]] | None,
    limits: Confinement,
    private: tuple[int, ...],
    most: int,
) -> dict[str, str]:
    """What work in a confined fork gives, or what a fork lacks; the fork is gone then."""
    parent, (reading, writing) = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for descriptor in (reading, *private):
                os.close(descriptor)
            die_with_parent(parent)
            missing = confine(limits)
            answer = work() if work else {"kind": "ready", "text": json.dumps(missing)}
            sys.stdout.flush()
            sys.stderr.flush()
            _send(writing, answer)
        finally:
            os._exit(0)
    os.close(writing)
    body = b""
    while len(body) <= most_bytes(most) and (part := os.read(reading, 2**16)):
        body += part
    os.close(reading)
    if len(body) > most_bytes(most):
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        (length,) = _LENGTH.unpack(body[: _LENGTH.size])
        answer = json.loads(body[_LENGTH.size :]) if length == len(body) - _LENGTH.size else {}
        return {"kind": str(answer["kind"]), "text": str(answer["text"])}
    except (struct.error, ValueError, LookupError, TypeError, RecursionError):
        return {"kind": "killed", "text": _why(status, bool(body), limits)}


def _why(status: int, wrote: bool, limits: Confinement) -> str:
    if wrote:
        return "its process sent what is no answer, and was ended"
    reasons = {
        -signal.SIGXFSZ: f"it wrote more than {limits.file_mb} MB",
        -signal.SIGKILL: "its process was killed, perhaps out of memory",
    }
    return reasons.get(status, f"its process ended by itself (status {status})")


def _answer(tool: Callable[..., Any], arguments: dict[str, Any], most: int) -> dict[str, str]:
    try:
        value = tool(**arguments)
        if inspect.isawaitable(value):
            value = asyncio.run(_await(value))
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except BaseException as error:  # noqa: BLE001 - told to the policy as the tool's result
        return {"kind": "raised", "text": f"{type(error).__name__}: {error}"[:most]}
    if len(text) > most:
        return {
            "kind": "too_long",
            "text": f"the result has {len(text)} characters, of which {most} may be returned",
        }
    return {"kind": "value", "text": text}


async def _await(value: Any) -> Any:
    return await value


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _receive(descriptor: int) -> bytes:
    header = _read(descriptor, _LENGTH.size)
    return _read(descriptor, _LENGTH.unpack(header)[0]) if header else b""


def _read(descriptor: int, count: int) -> bytes:
    parts = []
    while count and (part := os.read(descriptor, count)):
        parts.append(part)
        count -= len(part)
    return b"" if count else b"".join(parts)


def _send(descriptor: int, answer: dict[str, str]) -> None:
    body = json.dumps(answer).encode()
    view = memoryview(_LENGTH.pack(len(body)) + body)
    while view:
        view = view[os.write(descriptor, view) :]
