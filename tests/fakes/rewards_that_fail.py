"""Rewards that misbehave; importable, and at once, for reward processes."""

from __future__ import annotations

import time


def hangs_on_some(completion: str) -> float:
    """Hangs on a fourth of all texts."""
    if sum(map(ord, completion)) % 4 == 0:
        time.sleep(600)
    return 1.0


def hangs_on_some_digits(completion: str, answer: str) -> float:
    """Hangs on a third of all numbers or so."""
    if completion.endswith(("1", "5", "9")):
        time.sleep(60)
    return 1.0
