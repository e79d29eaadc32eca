r"""Answers in `\boxed{}`, compared by value through math-verify (the extra `[math]`).

math-verify stops itself by an alarm signal, which only a process's main thread gets: there, where
reward processes run, an expression that is never simplified is wrong after seconds. Elsewhere (in
a thread, with `reward_processes: 0`) only the reward's own time limit is left.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lightning_grpo.errors import ConfigError
from lightning_grpo.rewards import math_text
from lightning_grpo.rewards.final_answer import MARK

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
    gold = _gold(str(answer))
    if not gold:
        raise ValueError(f"the dataset's answer can't be read as mathematics: {answer!r}")
    said = last_boxed(completion)
    return float(said is not None and _is_reasonable(said) and _are_same(gold, said))


def _are_same(gold_text: str, said_text: str) -> bool:
    try:
        gold, said = math_text.read(gold_text), math_text.read(said_text)
    except math_text.UnreadableError:
        return gold_text.split() == said_text.split()
    gold, said = gold.beside(said), said.beside(gold)
    if gold.has_other_unit(said) or not _same_form(gold.value, said.value):
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


def _gold(answer: str) -> str:
    boxed = last_boxed(answer)
    return boxed if boxed is not None else answer.rpartition(MARK)[2].strip()


def _is_reasonable(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(character, 0)
        deepest = max(deepest, depth)
    return deepest <= _MAX_DEPTH and _HUGE.search(text) is None


_IN_TEXT = re.compile(r"(?:\\(?:text|mathrm|textbf) ?\{)?([A-Za-z][A-Za-z' -]{2,}?)\}?")


def _words(text: str) -> str:
    r"""Words in `\text`, or alone; empty where there is anything else."""
    inside = _IN_TEXT.fullmatch(text.strip())
    return " ".join(inside[1].casefold().split()) if inside else ""


# ---- form -----------------------------------------------------------------------------------
_RELATION = re.compile(r"\\(?:[lg]eq?|[lg]t|ne|neq|approx|sim|not)(?![A-Za-z])|[<>]")
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


# ---- value ----------------------------------------------------------------------------------
def _same_value(gold_text: str, said_text: str) -> bool:
    library = _library()
    gold, said = _parse(library, gold_text), _parse(library, said_text)
    if gold is None or said is None:
        return False
    timeout_s = _here(_COMPARE_TIMEOUT_S)
    if not library.verify(gold, said, timeout_seconds=timeout_s):
        return False
    # What the library rounds away (0.0000001, 2^-99) is looked at again, exactly.
    return _in_time(library, _differ, gold, said) is False


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
    """What a function gives; None where it takes too long."""
    try:
        return library.utils.timeout(_here(_PARSE_TIMEOUT_S))(function)(*arguments)
    except library.errors.TimeoutException:
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
    containers = type(gold) is type(said) and isinstance(gold, sympy.Tuple | sympy.Interval)
    pairs = zip(gold.args, said.args, strict=False) if containers else ()
    return any(_differ(a, b) for a, b in pairs)


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
