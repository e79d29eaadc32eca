"""Refusals that come without a place: jsonargparse's text, and constructors' messages."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from types import FrameType

from lightning_grpo.cli.problem import ConfigProblem, one_line
from lightning_grpo.cli.sources import Setting
from lightning_grpo.errors import ConfigError

_KEY = re.compile(r'(?:Parser key|Key) "([^"]+)"')
_NOISE = re.compile(r"^(Errors|Subtypes|Given value|Does not validate|Parser key|Problem with)")


def condense(message: str, settings: Setting) -> ConfigProblem:
    """The parser's message as key, place and its most specific line."""
    key = ".".join(_KEY.findall(message))
    lines = [line.strip(" -") for line in message.splitlines()]
    telling = [line for line in lines if line and not _NOISE.match(line)]
    rule = max(telling, key=len) if telling else message
    return ConfigProblem(key, rule, _place(key, settings))


def _place(key: str, settings: Setting) -> str:
    """Where the key, or the nearest key above it, was written."""
    written = {k.replace("init_args.", ""): s.where for k, s in settings.walk()}
    while key:
        if key in written:
            return written[key]
        key = key.rpartition(".")[0]
    return ""


def locate(message: str, settings: Setting) -> ConfigProblem:
    """A constructor's refusal, at the setting that it names.

    The message names a parameter in backticks and mostly the value that it got; among settings of
    that name the one with that value is meant. A parameter that nobody wrote (`servers.python`)
    is found at what it belongs to, and a message that names none at a value that it repeats.
    """
    found = _named_setting(message, settings)
    sentence, _, way_out = one_line(message).partition(". ")
    if found is None:
        return ConfigProblem("", sentence, "", way_out)
    key, setting = found
    return ConfigProblem(key, sentence, setting.where, way_out)


def _named_setting(message: str, settings: Setting) -> tuple[str, Setting] | None:
    quoted = [name.strip(".") for name in re.findall(r"`([\w.]+)", message)]
    quoted = [part for name in quoted for part in dict.fromkeys((name, name.rpartition(".")[2]))]
    words = re.findall(r"\w+", message)
    leaves = [(key, setting) for key, setting in settings.walk()]
    owners = [name.rpartition(".")[0] for name in quoted if "." in name]
    for name in [*quoted, *words, *owners]:
        named = [kv for kv in leaves if kv[0] == name or kv[0].endswith("." + name)]
        if not named:
            continue
        told = [kv for kv in named if _mentions(message, kv[1].plain())]
        if name in quoted or name in owners or told:
            return (told or named)[0]
    repeated = [kv for kv in leaves if _is_address(kv[1].plain())]
    repeated = [kv for kv in repeated if _mentions(message, kv[1].plain())]
    # `got 'x'` is about what was given; what else the message repeats may be a way out.
    got = [kv for kv in repeated if repr(kv[1].plain()) in message]
    return next(iter(got or repeated), None)


def _is_address(value: object) -> bool:
    """Whether it is long enough a word for its repetition to be no accident."""
    return isinstance(value, str) and bool(re.search(r"[:/]", value))


def _mentions(message: str, value: object) -> bool:
    """Whether the message repeats the value as a word of its own."""
    return re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", message) is not None


def refused_build(error: BaseException, settings: Setting) -> ConfigProblem:
    """What a constructor raised, at the setting that it was built from.

    jsonargparse wraps it where the parameter is optional.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, ConfigError):
            return locate(str(cause), settings)
    frames = [frame for cause in causes for frame, _ in traceback.walk_tb(cause.__traceback__)]
    built = {name for frame in frames for name in _names_of(frame)}
    for key, setting in settings.walk():
        value = setting.value
        if isinstance(value, str) and value.rpartition(".")[2] in built:
            rule = f"`{value}` could not be built: {fault_of(causes[-1])}"
            return ConfigProblem(key.removesuffix(".class_path"), rule, setting.where)
    return locate(f"could not be built: {fault_of(causes[-1])}", settings)


def fault_of(error: BaseException) -> str:
    """An exception of the user's code in one line, with its place."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return said
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _names_of(frame: FrameType) -> tuple[str, ...]:
    """The function that runs in a frame, and the class of the object that it builds."""
    name = frame.f_code.co_name
    owner = frame.f_locals.get("self")
    return (type(owner).__name__,) if name == "__init__" and owner is not None else (name,)
