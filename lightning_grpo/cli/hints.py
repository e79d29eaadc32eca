"""Type annotations of settings: what they are, what they accept, and how to say it."""

from __future__ import annotations

import types
from collections.abc import Callable
from enum import Enum
from inspect import isclass
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from lightning_grpo.cli.sources import Setting

_PLAIN_MODULES = ("builtins", "datetime", "os", "pathlib", "typing")
_NAMES = {
    int: "an int",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def members(annotation: Any) -> list[Any]:
    """The members of a union, in order; a plain type alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) for m in members(a)]
    return [annotation]


def is_call(member: Any) -> bool:
    """Whether it is a `Callable[...]`."""
    return member is Callable or get_origin(member) is Callable


def is_component(member: Any) -> bool:
    """Whether values of this type are made by a constructor with settings of its own."""
    return (
        isclass(member)
        and get_origin(member) is None
        and member.__module__ not in _PLAIN_MODULES
        and not issubclass(member, (Enum, str, int, float))
    )


def has_constructor(annotation: Any) -> bool:
    """Whether settings of this type can have settings of their own."""
    return any(is_component(m) or is_call(m) for m in members(annotation))


def call_shape(member: Any) -> tuple[int, type]:
    """How many arguments the caller of a `Callable[[...], R]` supplies, and R if it is a class."""
    arguments = get_args(member)
    if not arguments:
        return 0, object
    supplied = len(arguments[0]) if isinstance(arguments[0], list) else 0
    results = [m for m in members(arguments[-1]) if is_component(m)]
    return supplied, results[0] if len(results) == 1 else object


def accepts(annotation: Any, setting: Setting) -> bool:
    """Whether jsonargparse takes the value; on the command line also as text.

    It takes null for everything; here null stands only where the annotation names it.
    """
    if setting.value is None:
        return annotation is Any
    if annotation is Any or not (isclass(annotation) or get_origin(annotation)):
        return True
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    value = setting.plain()
    as_text = setting.where == "command line" and not isinstance(value, dict | list)
    candidates = [value, str(value)] if as_text else [value]
    return any(_parses(parser, candidate) for candidate in candidates)


def _parses(parser: ArgumentParser, value: Any) -> bool:
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def type_name(annotation: Any) -> str:
    """A type in words."""
    parts = members(annotation)
    choices = [str(choice) for part in parts for choice in _choices(part)]
    names = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    names += [_one_name(part) for part in parts if not _choices(part)]
    return " or ".join(dict.fromkeys(names))


def _choices(part: Any) -> list[Any]:
    if get_origin(part) is Literal:
        return list(get_args(part))
    if isclass(part) and get_origin(part) is None and issubclass(part, Enum):
        return [member.name for member in part]
    return []


def _one_name(part: Any) -> str:
    if is_call(part):
        return "the import path of a function"
    origin, arguments = get_origin(part), get_args(part)
    if origin in (list, tuple) and arguments:
        return f"a list, each {type_name(arguments[0])}"
    plain = origin or part
    return _NAMES.get(plain, plain.__name__ if isclass(plain) else str(part))
