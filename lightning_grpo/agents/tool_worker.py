"""The inside of a tool process: loads the tools, confines itself, answers one call at a time.

Messages are a length in four bytes and that many bytes. The first holds the pickled orders; then
each is a JSON object `{"tool": index, "arguments": {...}}`, answered by `{"kind", "text"}`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from lightning_grpo.rewards.confine import confine, die_with_parent

_LENGTH = struct.Struct("=I")
_TRACEBACK_CHARACTERS = 2000


def main() -> None:
    """Serves until standard input closes."""
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    orders = cloudpickle.loads(_receive(incoming))
    die_with_parent(orders["parent"])
    # What tools print goes to a file, whose size is limited; it is emptied after each call.
    printed = os.open(orders["printed"], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    try:
        tools = [cloudpickle.loads(blob) for blob in orders["tools"]]
    except BaseException:  # noqa: BLE001 - told to the parent as text
        _send(outgoing, {"kind": "error", "text": traceback.format_exc()[-_TRACEBACK_CHARACTERS:]})
        return
    missing = confine(orders["confinement"])
    _send(outgoing, {"kind": "ready", "text": json.dumps(missing)})
    scratch = Path(orders["confinement"].scratch)
    while message := _receive(incoming):
        call = json.loads(message)
        _send(outgoing, _answer(tools[call["tool"]], call["arguments"], orders["most_characters"]))
        sys.stdout.flush()
        os.ftruncate(printed, 0)
        os.lseek(printed, 0, os.SEEK_SET)
        _empty(scratch)


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
