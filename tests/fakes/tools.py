"""Tools by name: a tool process imports the module of one, so this one imports next to nothing."""

from __future__ import annotations

import asyncio


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: One number.
        b: Another.
    """
    return a + b


def echo(text: str) -> str:
    """Says it again.

    Args:
        text: What.
    """
    return text


async def sleep(seconds: float) -> str:
    """Takes its time.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return "slept"
