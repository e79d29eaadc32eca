"""The official rule of GSM8K: the number after the last `####`, compared exactly."""

from __future__ import annotations

import re
from decimal import Decimal

MARK = "####"

_SEARCHED_CHARACTERS = 256
_MAX_DIGITS = 64

# Sign and currency in either order, thousands in groups of three or without commas, decimals. Not a
# part of a word, and not the start of an expression, a list or a range, whose value it wouldn't be.
_NUMBER = re.compile(
    r"(?<![\w.,])(?P<sign>[-+\u2212]?)[$\u20ac\u00a3]?\s?(?P<inner>[-+\u2212]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+(?![0-9]))?(?P<part>\.[0-9]+(?![0-9]))?"
)
_GOES_ON = re.compile(r"\s*[-\u2212/:^*+=x\u00d7]\s*[0-9]|,\s?[0-9]|\.[0-9]|[eE][-+]?[0-9]")


def gsm8k(completion: str, answer: str) -> float:
    """1.0 if the completion's final answer is the gold answer's number, else 0.0.

    Args:
        completion: What the model wrote; its last `####` counts, and none is wrong.
        answer: The dataset's answer, with its own `####`, or the number alone.

    Raises:
        ValueError: The dataset's answer has no number, so nothing could be right.
    """
    gold = _gold(str(answer))
    if gold is None:
        raise ValueError(f"the dataset's answer holds no number: {answer!r}")
    return float(final_number(completion) == gold)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####` of a text, exactly; None if there is none."""
    _, mark, rest = text.rpartition(MARK)
    return _first_number(rest) if mark else None


def _gold(answer: str) -> Decimal | None:
    return final_number(answer) if MARK in answer else _first_number(answer)


def _first_number(text: str) -> Decimal | None:
    # In the first line only, and a megabyte behind it isn't read.
    lines = text[:_SEARCHED_CHARACTERS].lstrip().splitlines()
    line = lines[0] if lines else ""
    for match in _NUMBER.finditer(line):
        whole, part = match["whole"] or "", match["part"] or ""
        if whole or part:
            too_long = len(whole) + len(part) > _MAX_DIGITS
            if too_long or _GOES_ON.match(line, match.end()):
                return None
            negative = _plain(match["sign"] + match["inner"]).count("-") % 2
            number = Decimal(f"{whole.replace(',', '') or '0'}{part}")
            return -number if negative else number
    return None


def _plain(sign: str) -> str:
    return sign.replace("\u2212", "-")
