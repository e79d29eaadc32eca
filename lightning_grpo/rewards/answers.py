r"""Answers read out of completions and compared: GSM8K's rule, mathematics by value, formats.

Mathematics as people and models write it, in the one spelling that math-verify reads rightly.

What it would read as something else (digits beside digits, superscripts, repeating decimals, mixed
numbers, number bases, bare units) is rewritten here, or told as unreadable: a wrong answer then.

Answers in `\boxed{}`, compared by value through math-verify (the extra `[math]`).

math-verify stops itself by an alarm signal, which only a process's main thread gets: there, where
reward processes run, an expression that is never simplified is wrong after seconds. Elsewhere (in
a thread, with `reward_processes: 0`) only the reward's own time limit is left.
"""

from __future__ import annotations

import itertools
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

from lightning_grpo.errors import ConfigError

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
_FRACTIONS = (
    "half|halves|thirds?|fourths?|quarters?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|"
    "twelfths?|hundredths?|thousandths?|millionths?|billionths?"
)
_SCALE = (
    "hundred|thousand|lakh|million|crore|billion|trillion|quadrillion|quintillion|myriad|dozen|score|"
    f"{_FRACTIONS}|[kKMB]|mn|bn|squared|cubed|factorial|doubled|tripled|halved|twice|"
    "pi|[xyzei\u03c0]"
)
_JOINS = (
    "or|and|to|through|thru|until|plus|minus|times|point|over|divided by|versus|vs|but|base|"
    "maybe|perhaps|possibly|alternatively|otherwise|no|nope|wait|actually|rather|instead|sorry|"
    "correction|else"
)
_GOES_ON = re.compile(
    rf"[^\w().!]*{_DIGIT}"
    rf"|(?:\s*\.)+\s*{_DIGIT}|\s*[eE][-+]?{_DIGIT}|_\{{?\w|\s*\({_DIGIT}+\)"
    rf"|\s*[x\u00d7]\s*{_DIGIT}|\s*[CP]_?\{{?{_DIGIT}"
    rf"|\s*\\(?:[dt]?frac|cdot|times|div|sqrt|pm|pi)"
    rf"|[\s+*-]*(?:(?:one|two|three)[\s-]+)?(?:{_SCALE})(?![^\W\d])"
    # A number in the same unit ("5 eggs, 6 eggs").
    rf"|\W*({_WORD})[^\w()]+[^\W\d]{{0,2}}{_DIGIT}+\W*\1(?![^\W\d])"
    # One unit, perhaps squared, and a number right behind it.
    rf"|[^\w().!]*{_WORD}(?:\^?\{{?[23{_OTHER_DIGIT}]\}}?(?![\d.]))?+[^\w().!?,;]*{_DIGIT}"
    rf"|(?:\W*{_WORD}){{0,2}}?\W+(?i:{_JOINS})\W+(?:{_WORD}\W+){{0,2}}?(?:{_DIGIT}|(?:{_NUMERAL})\b)"
)
# What stands before a number and makes another of it.
_NOT_ITSELF = re.compile(
    r"(?:[\u00b1\u2213\u2260\u221a\u221b\u2264\u2265^<]|(?<![-=])>|\\(?:pm|mp|neq?|[gl]eq?|[gl]t)"
    rf"|\\sqrt\{{?|{_OTHER_DIGIT}|\b(?:not|than|twice|minus|negative|sqrt|log|ln|double|triple"
    r"|(?:half|thirds?|quarters?)(?:\s+of)?))[\s$*(\\]*$",
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


class UnreadableError(ValueError):
    """No reading of the text is safe."""


@dataclass(frozen=True)
class MathText:
    """An answer, apart from its unit.

    Attributes:
        value: The expression, in LaTeX.
        unit: Its name and power; empty where it has none.
        letters: What may be a unit or variables ("5 m"): only the other answer tells.
    """

    value: str
    unit: tuple[str, str] = ("", "")
    letters: str = ""

    def beside(self, other: MathText) -> MathText:
        """This answer, its last letters read as a unit if the other one has a unit in words."""
        if not self.letters or not other.unit[0]:
            return self
        value = self.value.removesuffix(self.letters).rstrip()
        if re.search(r"(?<![\\A-Za-z])[A-Za-z]", value):  # variables, so this is one, too
            return self
        return MathText(value, _unit(self.letters, ""))

    def has_other_unit(self, other: MathText) -> bool:
        """Whether both name a unit, and not the same."""
        return bool(self.unit[0] and other.unit[0]) and self.unit != other.unit


def read_math(text: str) -> MathText:
    """Rewrite an answer.

    Raises:
        UnreadableError: No reading is safe.
    """
    value, unit = _without_unit(_spelled(text))
    value = _numbers(value)
    bare = _LETTERS.search(value) if not unit[0] else None
    return MathText(value, unit, bare[1] if bare else "")


# ---- characters -----------------------------------------------------------------------------
_MARKUP = re.compile(r"^(\*\*|__|\*|`|\\\(|\\\[)(.+?)(\*\*|__|\*|`|\\\)|\\\])$", re.DOTALL)
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f\u2071]+")
_SUBSCRIPTS = re.compile("[\u2080-\u2089]+")
_WRITTEN = {
    "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u2215": "/",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u2264": r"\le ",
    "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ", "\u00b1": r"\pm ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ",
    "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u2032": "'",
    "\u2026": r"\ldots ", "\u20ac": r"\text{euro}", "\u00a3": r"\text{pound}", "\u2236": ":",
}  # fmt: skip
_ROOT = re.compile("\u221a\\s*(\\d+|[A-Za-z]|(?=[({]))")
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|[~\s]+")
_SWITCHES = re.compile(r"\\(?:displaystyle|limits|left|right|mathstrut)(?![A-Za-z])")
_SAME = (
    (re.compile(r"\\mathrm\s*\{\s*(e|i|d)\s*\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d),?\\!,?(?=\d{3})"), ","),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (
        re.compile(r"\\(?:text|mathrm)\s*\{\s*(?:and|or)\s*\}|(?<=[\s\d}])(?:and|or)\s(?=\s*\S)"),
        ",",
    ),
    (re.compile(r",\s*,"), ","),
    (re.compile(r"^\\(?:text|mathrm|mbox) ?\{([^{}A-Za-z]*\d[^{}A-Za-z]*)\}$"), r"\1"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"^\\(?:textbf|mathbf|boldsymbol|bm|textit|mathit) ?\{([^{}]*)\}$"), r"\1"),
    (re.compile(r"\\\{\s*\\\}|\\varnothing"), r"\\emptyset"),
)


def _spelled(text: str) -> str:
    text = text.strip()
    while (found := _MARKUP.match(text)) is not None:
        text = found[2].strip()
    text = "".join("-" if character in MINUS[:7] + MINUS[8:] else character for character in text)
    text = _SUPERSCRIPTS.sub(lambda found: f"^{{{_ascii(found[0])}}}", text)
    text = _SUBSCRIPTS.sub(lambda found: f"_{{{_ascii(found[0])}}}", text)
    text = "".join(_plain_math(character) for character in text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1]}}}" if found[1] else r"\sqrt", text)
    text = re.sub(r"(?<!\\)\$", "", text)
    # Row ends of matrices and spaces begin with the same character.
    rows = [_SPACES.sub(" ", part) for part in text.split(r"\\")] if "matrix" in text else None
    text = r"\\".join(rows) if rows else _SPACES.sub(" ", _same(text))
    text = _SWITCHES.sub("", _same(text))
    return re.sub(r"(?<!\.)\.$", "", text.strip()).strip()


def _same(text: str) -> str:
    for pattern, written in _SAME:
        text = pattern.sub(written, text)
    return text


def _ascii(characters: str) -> str:
    return unicodedata.normalize("NFKC", characters).replace("\u2212", "-")


def _plain_math(character: str) -> str:
    if character.isascii():
        return character
    if character in _WRITTEN:
        return _WRITTEN[character]
    normal = unicodedata.normalize("NFKC", character)
    numerator, slash, denominator = normal.partition("\u2044")
    return rf" \frac{{{numerator}}}{{{denominator}}}" if slash and denominator else normal


# ---- numbers --------------------------------------------------------------------------------
_GROUPED = re.compile(r"(?<![\d.,_^\w])\d{1,3}(?: \d{3})+(?![\d])")
_MIXED = re.compile(
    r"(?<![\w.}^,])(-?) ?(\d+) ?(?:(?<= )(\d+) ?/ ?(\d+)|\\frac ?\{(\d+)\} ?\{(\d+)\})(?![\w.^])"
)
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{? ?(\d+) ?\}?(?![\d.])")
_BASED = re.compile(r"(?<![\w.}^])\(? ?(\d[0-9A-Za-z]*) ?\)? ?_ ?\{? ?\(? ?(\d{1,2}) ?\)? ?\}?")
_NAMED_BASE = re.compile(
    r"_ ?\{ ?(?:\\(?:text|mathrm|textrm|mbox|rm) ?\{)? ?(?:base[ -]?\}? ?)?"
    r"([a-z]+|\d{1,2}) ?\}? ?\}",
    re.IGNORECASE,
)
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
_UNREADABLE = (
    re.compile(r"(?<![\w^_.])\d(?:[\d.,]*\d)? +[\d.]"),  # digits beside digits
    re.compile(r"\d *(?:\\[lc]?dots|\.\.)"),  # a number that doesn't end
    re.compile(r"\d *: *0+(?!\d)"),  # a time of day
    re.compile(r"\\sqrt ?\(|\d ?'"),
    re.compile(r"\d ?\)? ?_"),  # a base that isn't one
)
_LOWEST_BASE, _HIGHEST_BASE = 2, 36


def _numbers(text: str) -> str:
    text = _GROUPED.sub(lambda found: found[0].replace(" ", ""), text)
    text = _REPEATING.sub(_repeating, text)
    text = _MIXED.sub(_mixed, text)
    text = _BASED.sub(_based, _NAMED_BASE.sub(_base_in_digits, text))
    if any(pattern.search(text) for pattern in _UNREADABLE):
        raise UnreadableError(text)
    return text


def _mixed(found: re.Match[str]) -> str:
    above, below = found[3] or found[5], found[4] or found[6]
    if int(below) == 0:
        raise UnreadableError(found[0])
    value = int(found[2]) + Fraction(int(above), int(below))
    return rf"{found[1]}\frac{{{value.numerator}}}{{{value.denominator}}}"


def _repeating(found: re.Match[str]) -> str:
    before, once, again = found[1] or "0", found[2], found[3]
    nines = (10 ** len(again) - 1) * 10 ** len(once)
    value = Fraction(int(before + once + again) - int(before + once), nines)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _base_in_digits(found: re.Match[str]) -> str:
    base = found[1] if found[1].isdecimal() else _BASES.get(found[1].lower())
    return found[0] if base is None else f"_{{{base}}}"


def _based(found: re.Match[str]) -> str:
    base = int(found[2])
    try:
        if not _LOWEST_BASE <= base <= _HIGHEST_BASE:
            raise UnreadableError(found[0])
        return str(int(found[1], base))
    except ValueError as error:
        raise UnreadableError(found[0]) from error


# ---- units ----------------------------------------------------------------------------------
_IN_WORDS = re.compile(
    r" *\\(?:text|mathrm|textrm|mbox|rm|operatorname) ?\{ *([^{}]*?) *\} ?"
    r"(?:\^ ?\{? ?(-?\d) ?\}?)?$"
)
# Without `\text`, what can't be taken for a product of variables ("mg", "ms").
_BARE_UNITS = (
    "[ckm]m|kg|ft|lb|oz|min|sec|hr|mph|kph|inch(?:es)?|feet|foot|yards?|miles?|"
    "(?:centi|milli|kilo)?(?:met(?:er|re)|gram|lit(?:er|re))s?|hours?|minutes?|seconds?|days?|"
    "weeks?|months?|years?|dollars?|cents?|euros?|pounds?|degrees?|units?|people"
)
_BARE = re.compile(
    rf"(?<=[\d}}]) *((?:(?:square|sq|cubic) )?(?:{_BARE_UNITS})"
    rf"(?: ?(?:/| per ) ?(?:{_BARE_UNITS}))?) ?(?:\^ ?\{{? ?(-?\d) ?\}}?)?$"
)
_LETTERS = re.compile(r"(?<=[\d} ]) *([A-Za-z]{1,3}(?:/[A-Za-z]{1,3})?)$")
_DOLLARS = re.compile(r"^(-?) ?\\\$ ?|^(-?) ?\\text\{(euro|pound)\} ?")
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
# In words, and makes another number of the one before it.
_NO_UNIT = re.compile(
    rf",|(?:{_FRACTIONS}|or|and|to|plus|minus|times|over|squared|cubed|factorial|base|choose|mod|"
    "quadrillion|lakh|crore|myriad|score|doubled|tripled|halved|twice|less than|more than|"
    r"pi|mn|bn|[xyzieknMB])(?![\w/])"
)
# Digits that are no power ("m2"), and words for numbers or for doubt ("7 eight", "7 cm or 8").
_SECOND_ANSWER = re.compile(
    rf",|(?<![a-z^])\d|[a-z^][014-9]|\d\d|(?:^|\W)(?:{_NUMERAL})\W*$|"
    r"\b(?:or|maybe|perhaps|possibly|no|not|nope|wait|actually|rather|else|instead)\b"
)
_SCALED = re.compile(rf"^({'|'.join(_SCALES)})s?(?: of)?(?= |$)")
_SAME_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "degree": "deg", "dollar": "$", "feet": "ft",
    "foot": "ft", "gram": "g", "hour": "h", "inch": "in", "inche": "in", "kilogram": "kg",
    "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m", "mile": "mi",
    "millimeter": "mm", "millimetre": "mm", "minute": "min", "second": "s", "sec": "s", "hr": "h",
    "liter": "l", "litre": "l", "kph": "km/h", "mph": "mi/h", "pound": "lb", "year": "yr",
}  # fmt: skip
_POWERS = (("square ", "2"), ("sq ", "2"), ("sq. ", "2"), ("cubic ", "3"))


def _without_unit(text: str) -> tuple[str, tuple[str, str]]:
    unit = ("", "")
    money = _DOLLARS.match(text)
    if money is not None:
        text, unit = text[money.end() :], (money[3] or "$", "")
        text = (money[1] or money[2] or "") + text
    found = _IN_WORDS.search(text)
    if found is None or not _may_have_unit(text[: found.start()]):
        found = _BARE.search(text) or _bare_scale(text)
    if found is None:
        return text, unit
    if _NO_UNIT.match(found[1].strip()):
        raise UnreadableError(text)
    name, value = found[1].strip(" .").lower(), text[: found.start()].rstrip()
    scale = _SCALED.match(name)
    if scale is not None:
        value = rf"({value}) \cdot {_SCALES[scale[1]]}"
        name = name[scale.end() :].strip()
    if _SECOND_ANSWER.search(name):
        raise UnreadableError(text)
    return value, _unit(name, found[2] or "") if name else unit


def _bare_scale(text: str) -> re.Match[str] | None:
    return re.search(rf"(?<=[\d}}]) *((?:{'|'.join(_SCALES)})s?(?: [a-z ]+)?)()$", text)


def _may_have_unit(value: str) -> bool:
    return re.search(r"[\d})\]A-Za-z]$", value.rstrip()) is not None


def _unit(name: str, power: str) -> tuple[str, str]:
    for word, number in _POWERS:
        if name.startswith(word):
            name, power = name.removeprefix(word), number
    parts = [_single(part.strip()) for part in re.split(r"/| per ", name.replace(r"\$", "$"))]
    return "/".join(parts), power


def _single(name: str) -> str:
    single = name.removesuffix("s") if len(name) > 1 else name
    return _SAME_UNITS.get(single, single)


_BOX = "\\boxed"
_MAX_CHARACTERS = 400
_MAX_DEPTH = 16
_DIGITS = 50
_PARSE_TIMEOUT_S, _COMPARE_TIMEOUT_S = 2, 4
# What the machine can't hold as a number: long powers, factorials, towers of powers.
_HUGE = re.compile(
    r"\^\s*\{?\s*-?\d{5,}|\d{60,}|\d{4,}\s*!|\^\s*\{?[^{}^]{0,40}\^\s*\{?\s*-?\d{2,}|!\s*!"
)


def math(completion: str, answer: str) -> float:
    r"""1.0 if the last `\boxed{}` of the completion has the value of the answer, else 0.0.

    No box, an unfinished one, and one that is too long, too deep or too large to be anybody's
    answer are wrong. Where both name a unit, it must be the same.

    Args:
        completion: What the model wrote.
        answer: The dataset's answer: with its own box or `####`, or the expression alone.

    Raises:
        ValueError: The dataset's answer is empty, so nothing could be right.
    """
    gold = _boxed_gold(str(answer))
    if not gold:
        raise ValueError(f"the dataset's answer can't be read as mathematics: {answer!r}")
    said = last_boxed(completion)
    return float(said is not None and _is_reasonable(said) and _are_same(gold, said))


def _are_same(gold_text: str, said_text: str) -> bool:
    try:
        gold, said = read_math(gold_text), read_math(said_text)
    except UnreadableError:
        return gold_text.split() == said_text.split()
    gold, said = gold.beside(said), said.beside(gold)
    if gold.has_other_unit(said) or not _same_form(gold.value, said.value):
        return False
    if any(_contradicts_itself(part) for part in said.value.split(",")):
        return False
    words = _words(gold_text)
    alike = gold.value == said.value or (words and words == _words(said_text))
    return bool(alike) or _same_value(gold.value, said.value)


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


def _boxed_gold(answer: str) -> str:
    boxed = last_boxed(answer)
    return boxed if boxed is not None else answer.rpartition(MARK)[2].strip()


def _is_reasonable(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(character, 0)
        deepest = max(deepest, depth)
    return deepest <= _MAX_DEPTH and _HUGE.search(text) is None


_EMPTY = re.compile(r"\\[a-z]+ ?\{\}")
_IN_TEXT = re.compile(r"(?:\\(?:text|mathrm|textbf) ?\{)?([A-Za-z][A-Za-z' -]{2,}?)\}?")


def _words(text: str) -> str:
    r"""Words in `\text`, or alone; empty where there is anything else."""
    inside = _IN_TEXT.fullmatch(text.strip())
    return " ".join(inside[1].casefold().split()) if inside else ""


# ---- form -----------------------------------------------------------------------------------
_RELATION = re.compile(r"\\(?:[lg]eq?|[lg]t|ne|neq|approx|sim|not)(?![A-Za-z])|[<>]")
_SHORTEST_CHAIN = 3
_SETS = re.compile(r"\\(?:cup|cap|in|infty|setminus)(?![A-Za-z])|[\[\]()]")


def _same_form(gold: str, said: str) -> bool:
    """Whether an answer is a point, a set, a number or a relation as the gold is."""
    if _RELATION.search(said) and not (_RELATION.search(gold) or _SETS.search(gold)):
        return False
    kinds = _bracket(gold), _bracket(said)
    if kinds[0] == kinds[1]:
        return True
    # An unordered list needs no braces, nor a value parentheses.
    several = "," in gold and "," in said
    bare = [kind for kind in kinds if kind]
    return len(bare) == 1 and (bare[0] != "[" if several else bare[0] == "(")


def _bracket(text: str) -> str:
    """What opens the text, if its partner ends it."""
    text = text.replace("\\{", "\x01").replace("\\}", "\x02")
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, "[": 1, "\x01": 1, ")": -1, "]": -1, "\x02": -1}.get(character, 0)
        if depth == 0:
            return text[0] if place and place == len(text) - 1 else ""
    return ""


def _contradicts_itself(text: str) -> bool:
    """Whether a chain of equations names two numbers ("x = 8 = 7")."""
    sides = text.split("=")
    if len(sides) < _SHORTEST_CHAIN:
        return False
    library = _library()
    values = [_parse(library, side) for side in sides]
    numbers = [value for value in values if value is not None and not value.free_symbols]
    return any(_in_time(library, _differ, a, b) for a, b in itertools.pairwise(numbers))


# ---- value ----------------------------------------------------------------------------------
def _same_value(gold_text: str, said_text: str) -> bool:
    library = _library()
    apart = _cases_apart(gold_text, said_text)
    gold, said = (_parse(library, apart(text)) for text in (gold_text, said_text))
    if gold is None or said is None:
        return False
    timeout_s = _here(_COMPARE_TIMEOUT_S)
    if not library.verify(gold, said, timeout_seconds=timeout_s):
        return False
    # What the library rounds away (0.0000001, 2^-99) is looked at again, exactly.
    return _in_time(library, _differ, gold, said) is False


_VARIABLE = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_ONE_LETTER = re.compile(r"\W*(?:\\(?:text|mathrm|textbf) ?\{)?\W*[A-Za-z]\W*")
_CONSTANT = "C"
"""Of integration, in either case."""
_SPARE = tuple(rf"\{name} " for name in ("eta", "kappa", "mu", "nu", "xi", "tau", "chi", "psi"))


def _cases_apart(*texts: str) -> Callable[[str], str]:
    """Renames capitals where a letter stands in both cases: the library reads `R` as `r`.

    A choice ("C") may be said in either case.
    """
    if all(_ONE_LETTER.fullmatch(each) for text in texts for each in text.split(",")):
        return lambda text: text
    names = {name for text in texts for name in _VARIABLE.findall(text)}
    both = {name for name in names - {_CONSTANT} if name.lower() in names - {name}}
    spare = (name for name in _SPARE if name.strip() not in names)
    renamed = dict(zip(sorted(both), spare, strict=False))
    return lambda text: _VARIABLE.sub(lambda name: renamed.get(name[0], name[0]), text)


def _parse(library: ModuleType, text: str) -> Any:
    import latex2sympy2_extended as latex  # comes with math-verify

    # All of the text, or nothing: no number out of the midst of it, no letter taken for a unit.
    plain = latex.NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    found = library.parse(
        f"${text}$",
        [library.LatexExtractionConfig(normalization_config=plain)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=_here(_PARSE_TIMEOUT_S),
    )
    return _in_time(library, _exact, found[0]) if found else None


def _in_time(library: ModuleType, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives; None where it takes too long, or sympy can't make sense of it."""
    try:
        return library.utils.timeout(_here(_PARSE_TIMEOUT_S))(function)(*arguments)
    except (Exception, library.errors.TimeoutException):  # noqa: BLE001 - the policy's own doing
        return None


def _exact(value: Any) -> Any:
    """Decimals as the fractions that they are."""
    import sympy

    floats = value.atoms(sympy.Float) if isinstance(value, sympy.Basic) else ()
    return value.xreplace({number: sympy.Rational(str(number)) for number in floats})


def _differ(gold: Any, said: Any) -> bool:
    """Whether two values are certainly not the same; the parts of sets and tuples one by one."""
    import sympy

    if isinstance(said, sympy.Eq | sympy.And) and not isinstance(gold, sympy.Eq | sympy.And):
        numbers = [side for side in _sides(said) if not side.free_symbols]
        return any(_differ(a, b) for a, b in itertools.pairwise(numbers))
    if isinstance(gold, sympy.FiniteSet) and isinstance(said, sympy.FiniteSet):
        return any(all(_differ(a, b) for b in said) for a in gold)
    if isinstance(gold, sympy.Expr) and isinstance(said, sympy.Expr):
        return _are_unequal(gold, said)
    return any(_differ(a, b) for a, b in zip(_entries(gold), _entries(said), strict=False))


def _entries(value: Any) -> Sequence[Any]:
    import sympy

    if isinstance(value, sympy.MatrixBase):
        return list(value)
    return value.args if isinstance(value, sympy.Tuple | sympy.Interval) else ()


def _sides(relation: Any) -> list[Any]:
    import sympy

    parts = relation.args if isinstance(relation, sympy.And) else (relation,)
    return [side for part in parts if isinstance(part, sympy.Eq) for side in part.args]


def _are_unequal(gold: Any, said: Any) -> bool:
    import sympy

    symbols = sorted(gold.free_symbols | said.free_symbols, key=str)
    for shift in range(3 if symbols else 1):
        at = {s: sympy.Rational(7 + 3 * n + shift, 11) for n, s in enumerate(symbols)}
        pair = [side.subs(at).evalf(_DIGITS) for side in (gold, said)]
        if not all(side.is_number and side.is_finite for side in pair):
            return False
        least = sympy.Float(10) ** (8 - _DIGITS) * max(abs(pair[0]), abs(pair[1]))
        if abs(pair[0] - pair[1]) <= least:
            return False
    return True


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


def marks_answer(completion: str) -> float:
    """1.0 if the completion marks its answer with exactly one `####` in its last line."""
    lines = completion.rstrip().splitlines() or [""]
    return float(completion.count(MARK) == 1 and MARK in lines[-1])


def boxes_answer(completion: str) -> float:
    r"""1.0 if the completion's last `\boxed{}` holds something, as `math` reads it."""
    inside = _EMPTY.sub("", _SPACES.sub("", last_boxed(completion) or ""))
    return float(bool(inside.strip("{}\\ \n\t")))


def has_tags(tags: Sequence[str] = ("think", "answer")) -> Callable[..., float]:
    """A reward: 1.0 if the completion is `<tag>...</tag>` for each tag in order and nothing else.

    The first tag may have been opened by the chat template, at the end of the prompt.

    Args:
        tags: Names, in the order in which they must come.
    """

    def tags_in_order(completion: str, prompt: str | None = None) -> float:
        rest = completion.strip()
        first = f"<{tags[0]}>" if tags else ""
        opened = prompt.rstrip().endswith(first) if prompt is not None else first not in rest
        if opened:
            rest = first + rest
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            content, found, after = rest.removeprefix(opening).partition(closing)
            if not rest.startswith(opening) or not found or opening in content:
                return 0.0
            rest = after.lstrip()
        return float(not rest)

    return tags_in_order
