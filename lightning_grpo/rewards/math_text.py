r"""Mathematics as people and models write it, in the one spelling that math-verify reads rightly.

What it would read as something else (digits beside digits, superscripts, repeating decimals, mixed
numbers, number bases, bare units) is rewritten here, or told as unreadable: a wrong answer then.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from lightning_grpo.rewards.final_answer import MINUS


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


def read(text: str) -> MathText:
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
    text = "".join(_plain(character) for character in text)
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


def _plain(character: str) -> str:
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
_DECIMAL = re.compile(r"(?<![\d.,])(\d*)\.(\d+)(?![\d.])")
_UNREADABLE = (
    re.compile(r"(?<![\w^_.])\d(?:[\d.,]*\d)? +[\d.]"),  # digits beside digits
    re.compile(r"\d *(?:\\[lc]?dots|\.\.)"),  # a number that doesn't end
    re.compile(r"\d *: *0+(?!\d)"),  # a time of day
    re.compile(r"\\sqrt ?\(|\d ?'"),
)
_HIGHEST_BASE = 36


def _numbers(text: str) -> str:
    text = _GROUPED.sub(lambda found: found[0].replace(" ", ""), text)
    text = _REPEATING.sub(_repeating, text)
    text = _MIXED.sub(_mixed, text)
    text = _BASED.sub(_based, text)
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


def _based(found: re.Match[str]) -> str:
    base = int(found[2])
    try:
        if base > _HIGHEST_BASE:
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
    name, value = found[1].strip(" .").lower(), text[: found.start()].rstrip()
    scale = _SCALED.match(name)
    if scale is not None:
        value = rf"({value}) \cdot {_SCALES[scale[1]]}"
        name = name[scale.end() :].strip()
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
