"""Rewards that misbehave; importable, for reward processes."""

from __future__ import annotations

import time


def hangs_on_some(completion: str) -> float:
    """Hangs on a fourth of all texts."""
    if sum(map(ord, completion)) % 4 == 0:
        time.sleep(600)
    return 1.0
