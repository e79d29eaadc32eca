"""The official rule of GSM8K: the number after the last `####`, compared exactly."""

from __future__ import annotations

import re
from decimal import Decimal

MARK = "####"

_SEARCHED_CHARACTERS = 256
_MAX_DIGITS = 64

MINUS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u207b\ufe58\ufe63\uff0d"
"""Characters that people and models write for a minus."""

# Sign and currency in either order, thousands in groups of three (one separator throughout) or
# without, decimals. Not a part of a word.
_NUMBER = re.compile(
    r"(?<![\w.,])(?P<sign>[-+]?)[$\u20ac\u00a3]?\s?(?P<inner>[-+]?)"
    r"(?P<whole>[0-9]{1,3}(?P<group>,|\{,\}|\\,|[ \u00a0\u2009\u202f])[0-9]{3}"
    r"(?:(?P=group)[0-9]{3})*(?![0-9])|[0-9]+(?![0-9]))?(?P<part>\.[0-9]+(?![0-9]))?"
)
_GROUPS = re.compile(r"[^0-9]")
# A number that goes on is another number: digits of other kinds (all written as one of them here),
# a fraction, an expression, a list, a range, a second unit ("5 feet 6"), a scale ("5 million").
_OTHER_DIGIT = "\u00bd"
_DIGIT = f"[0-9{_OTHER_DIGIT}]"
_WORD = r"[^\W\d]+"
_NUMERAL = (
    "a|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|"
    "eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|half|halves|quarters?|thirds?|"
    "fourths?|fifths?|hundred|thousand|million"
)
_SCALE = (
    "hundred|thousand|million|billion|trillion|dozen|score|half|quarters?|thirds?|[kKMB]|mn|bn|"
    "squared|cubed|factorial|pi|[xyzei\u03c0]"
)
_JOINS = "or|and|to|through|thru|until|plus|minus|times|point|over|divided by|versus|vs|but"
_GOES_ON = re.compile(
    rf"[^\w().!]*{_DIGIT}"
    rf"|\.{_DIGIT}|[eE][-+]?{_DIGIT}|\s*\({_DIGIT}+\)"
    rf"|\s*[x\u00d7]\s*{_DIGIT}"
    rf"|\s*\\(?:[dt]?frac|cdot|times|div|sqrt|pm|pi)"
    rf"|[\s-]*(?:{_SCALE})(?![^\W\d])"
    # One unit, perhaps squared, and a number right behind it.
    rf"|[^\w().!]*{_WORD}(?:\^?\{{?[23{_OTHER_DIGIT}]\}}?(?![\d.]))?+[^\w().!?,;]*{_DIGIT}"
    rf"|(?:\W*{_WORD}){{0,2}}?\W+(?:{_JOINS})\W+(?:{_WORD}\W+){{0,2}}?(?:{_DIGIT}|(?:{_NUMERAL})\b)"
)
# What stands before a number and makes another of it.
_NOT_ITSELF = re.compile(
    r"(?:[\u00b1\u2213\u2260\u221a\u221b\u2264\u2265^<]|(?<![-=])>|\\(?:pm|mp|neq?|[gl]eq?|[gl]t)"
    rf"|\\sqrt\{{?|{_OTHER_DIGIT}|\b(?:not|than|half|twice|minus|negative))[\s$*(\\]*$",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:minus|negative)[\s$*(]*$", re.IGNORECASE)


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
    line = "".join(map(_plain, lines[0])) if lines else ""
    for match in _NUMBER.finditer(line):
        whole, part = match["whole"] or "", match["part"] or ""
        if whole or part:
            before = line[: match.start()]
            negated = _NEGATED.search(before) is not None
            too_long = len(whole) + len(part) > _MAX_DIGITS
            if too_long or _GOES_ON.match(line, match.end()):
                return None
            if _NOT_ITSELF.search(before) and not negated:
                return None
            negative = negated ^ bool((match["sign"] + match["inner"]).count("-") % 2)
            number = Decimal(f"{_GROUPS.sub('', whole) or '0'}{part}")
            return -number if negative else number
    return None


def _plain(character: str) -> str:
    if character in MINUS:
        return "-"
    return _OTHER_DIGIT if character.isnumeric() and not character.isascii() else character
