r"""Answers in `\boxed{}`, compared by value through math-verify (the extra `[math]`).

math-verify stops itself by an alarm signal, which only a process's main thread gets: there, where
reward processes run, an expression that is never simplified is wrong after seconds. Elsewhere (in
a thread, with `reward_processes: 0`) only the reward's own time limit is left.
"""

from __future__ import annotations

import re
import threading
from types import ModuleType
from typing import Any

from lightning_grpo.errors import ConfigError
from lightning_grpo.rewards.final_answer import MARK

_BOX = "\\boxed"
_MAX_CHARACTERS = 400
_MAX_DEPTH = 16
_PARSE_TIMEOUT_S, _COMPARE_TIMEOUT_S = 2, 4
# What the machine can't hold as a number: long powers, factorials, towers of powers.
_HUGE = re.compile(
    r"\^\s*\{?\s*-?\d{5,}|\d{60,}|\d{4,}\s*!|\^\s*\{?[^{}^]{0,40}\^\s*\{?\s*-?\d{2,}|!\s*!"
)
_UNIT = re.compile(
    r"(?:\\[,;: ]|\s|~)*\\(?:text|mathrm|textrm|mbox|rm)\s*\{\s*([^{}]*?)\s*\}"
    r"\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?\s*\.?\s*$"
)
_SAME_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "degree": "deg", "dollar": "$", "feet": "ft",
    "foot": "ft", "gram": "g", "hour": "h", "inch": "in", "inche": "in", "kilogram": "kg",
    "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m", "mile": "mi",
    "minute": "min", "second": "s", "sec": "s", "hr": "h", "liter": "l", "litre": "l",
}  # fmt: skip


def math(completion: str, answer: str) -> float:
    r"""1.0 if the last `\boxed{}` of the completion has the value of the answer, else 0.0.

    No box, an unfinished one, and one that is too long, too deep or too large to be anybody's
    answer are wrong. Where both name a unit, it must be the same.

    Args:
        completion: What the model wrote.
        answer: The dataset's answer: with its own box or `####`, or the expression alone.

    Raises:
        ValueError: The dataset's answer can't be read, so nothing could be right.
    """
    gold_text = _gold(str(answer))
    said = last_boxed(completion)
    if said is None or not _is_reasonable(said) or _other_unit(gold_text, said):
        return 0.0
    library = _library()
    gold = _parse(library, gold_text)
    if not gold:
        raise ValueError(f"the dataset's answer can't be read as mathematics: {answer!r}")
    parsed = _parse(library, said)
    timeout_s = _here(_COMPARE_TIMEOUT_S)
    return float(bool(parsed) and bool(library.verify(gold, parsed, timeout_seconds=timeout_s)))


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` of a text holds; None if there is none, or it doesn't end."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    # An answer is short: of a longer box there is nothing to find.
    rest = text[start + len(_BOX) :][: _MAX_CHARACTERS + 2].lstrip()
    if not rest.startswith("{"):
        return None
    depth = 0
    for place, character in enumerate(rest):
        escaped = place > 0 and rest[place - 1] == "\\"
        depth += {"{": 1, "}": -1}.get(character, 0) if not escaped else 0
        if depth == 0:
            return rest[1:place].strip() or None
    return None


def _gold(answer: str) -> str:
    boxed = last_boxed(answer)
    return boxed if boxed is not None else answer.rpartition(MARK)[2].strip()


def _is_reasonable(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(character, 0)
        deepest = max(deepest, depth)
    return deepest <= _MAX_DEPTH and _HUGE.search(text) is None


def _other_unit(a: str, b: str) -> bool:
    units = [_UNIT.search(text) for text in (a, b)]
    if units[0] is None or units[1] is None:
        return False
    return _unit(units[0]) != _unit(units[1])


def _unit(match: re.Match[str]) -> tuple[str, str]:
    name = match[1].strip(" .").lower()
    power = match[2] or ""
    for word, number in (("square ", "2"), ("sq ", "2"), ("cubic ", "3")):
        if name.startswith(word):
            name, power = name.removeprefix(word), number
    single = name.removesuffix("s") if len(name) > 1 else name
    return _SAME_UNITS.get(single, single), power


def _parse(library: ModuleType, text: str) -> list[Any]:
    parsed: list[Any] = library.parse(f"${text}$", parsing_timeout=_here(_PARSE_TIMEOUT_S))
    return parsed


def _here(timeout_s: int) -> int | None:
    return timeout_s if threading.current_thread() is threading.main_thread() else None


def _library() -> ModuleType:
    try:
        import math_verify  # an extra, and slow to import
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the reward `math` needs math-verify. Install it: pip install 'lightning-grpo[math]'"
        ) from error
    library: ModuleType = math_verify
    return library
