"""Which signal a run acts on when more than one came."""

from __future__ import annotations

import signal
from collections.abc import Iterable

ENDING = ("SIGTERM", "SIGINT")
"""Signals that end a run; the others ask for it to be run again as well."""

_AGAIN = 128


def urgency(name: str) -> int:
    """A number to compare by, 0 for no signal.

    A cluster warns (SIGUSR1) and terminates right after, and the kernel may hand the two to
    different threads in either order: the one that keeps the job counts.
    """
    if not name:
        return 0
    return signal.Signals[name].value + (0 if name in ENDING else _AGAIN)


def signal_of(urgency: int) -> str:
    """The name behind a number of `urgency`."""
    return signal.Signals(urgency % _AGAIN).name if urgency else ""


def most_urgent(names: Iterable[str]) -> str:
    """The signal to act on; an empty string if there is none."""
    return signal_of(max(map(urgency, names), default=0))
