"""The calculator, and what is asked of it."""

from __future__ import annotations

import ast
import operator
import random
import zlib
from collections.abc import Iterator

HELD_OUT_PARTS = 6
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculator(expression: str) -> str:
    """Computes with whole numbers.

    Args:
        expression: Numbers joined by +, - and *.
    """
    return str(_value(ast.parse(expression, mode="eval").body))


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError(f"can't compute {ast.unparse(node)!r}")


def tasks(rng: random.Random, *, held_out: bool) -> Iterator[tuple[str, int]]:
    """Endless (expression, value) of one split."""
    while True:
        expression = f"{rng.randint(101, 999)} {rng.choice('+-*')} {rng.randint(11, 99)}"
        if (zlib.crc32(expression.encode()) % HELD_OUT_PARTS == 0) == held_out:
            yield expression, int(calculator(expression))


def question(expression: str) -> str:
    """What is asked."""
    return f"What is {expression}?"
