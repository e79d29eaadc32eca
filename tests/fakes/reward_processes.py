"""What runs in reward processes: importable there, and at once, which no module with torch is."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


def stuck(completion: str) -> float:
    while True:
        time.sleep(60)


def runaway_regex(completion: str) -> float:
    # Holds the interpreter for ages: no handler of a signal ever runs.
    return float(re.match(r"(a+)+$", "a" * 40 + "b") is None)


def crash(completion: str) -> float:
    os._exit(3)


def vanish(completion: str) -> float:
    os._exit(0)


def leave(completion: str) -> float:
    sys.exit("enough")


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


def hold(lock, held, until) -> None:
    """Take the lock, tell it, and keep it until told to let go."""
    with contextlib.closing(held), contextlib.closing(until):
        held.send(lock.acquire())
        until.recv()
        lock.release()
