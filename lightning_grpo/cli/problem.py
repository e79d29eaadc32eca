"""A mistake in the configuration, in at most three lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn

from lightning_grpo.errors import ConfigError

_MAX_CHARACTERS = 300


class Parser(argparse.ArgumentParser):
    """A command's own options; what is wrong with them is one message, not the usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise ConfigError(f"{message}\n  `{self.prog} --help` says what there is.")


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that counts: a whole number of `least` or more."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be >= {least}, got {text}")
        return number

    read.__name__ = "whole number"
    return read


class ConfigProblem(ConfigError):
    """One setting that can't work, with its place.

    Args:
        key: The dotted key; empty for a file as a whole.
        rule: The rule and the value, as the rest of a sentence that begins with the key.
        where: The file and line, or `command line`; empty when nobody wrote it (a default).
        suggestion: The nearest valid key, or another way out; may be empty.
    """

    def __init__(self, key: str, rule: str, where: str = "", suggestion: str = "") -> None:
        self.key, self.rule, self.where, self.suggestion = key, rule, where, suggestion
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The message: place, rule, way out."""
        place = " ".join(
            part for part in (self.key, f"({self.where})" if self.where else "") if part
        )
        indent = "  " if place else ""
        lines = [place] if place else []
        lines.append(indent + one_line(self.rule))
        if self.suggestion:
            lines.append(f"  {one_line(self.suggestion)}")
        return lines


def nearest(key: str, valid: Iterable[str], prefix: str = "", list_all: bool = True) -> str:
    """`did you mean ...?` with the nearest valid key, or the list when none is near.

    Args:
        key: What was written.
        valid: What could have been.
        prefix: Put before the suggestion.
        list_all: Whether to list what is valid when nothing is near.
    """
    names = [name for name in valid if name]
    close = get_close_matches(key, names, n=1, cutoff=0.6)
    starting = [name for name in names if key and name.startswith(key)]
    found = (starting if len(starting) == 1 else close)[:1]
    if found:
        return f"did you mean `{prefix}{found[0]}`?"
    return f"valid here: {', '.join(names)}" if names and list_all else ""


def one_line(text: str) -> str:
    """Text without line breaks, cut where it would fill the screen."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MAX_CHARACTERS else joined[: _MAX_CHARACTERS - 4] + " ..."
