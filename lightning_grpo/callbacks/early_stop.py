"""Signals before training begins: SIGTERM is an exception in the main thread, as Ctrl-C is one.

The default action would end the process on the spot: ranks that it started would wait for it, and
whatever else is under way would be left as it is. Standard library only, for the command line.
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning_grpo.errors import StopRun


class EarlyStop:
    """Raises `StopRun` on the first SIGTERM; the second one ends the process at once.

    It takes the place of the default action only: a handler of somebody else's stays. SIGUSR1, a
    cluster's warning before the time limit, is kept until training begins. SIGTERM is kept, too:
    the exception may come up in a library that catches all there are, or in a finalizer, and be
    lost there (`came_early`).

    Attributes:
        is_armed: Whether a signal is to be acted on; else the default action is what it gets.
        came: The signals that came.
    """

    def __init__(self) -> None:
        self.is_armed = False
        self.came: set[int] = set()

    def install(self) -> None:
        """From here on SIGTERM raises; only the main thread can have it so."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.is_armed, self.came = True, set()  # a run before may have had its own
        if _acts_as_default(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, self._stop)
        if _acts_as_default(signal.getsignal(signal.SIGUSR1)):
            signal.signal(signal.SIGUSR1, self._keep)

    def uninstall(self) -> None:
        """Signals are what they were, also where others have saved this handler and restore it."""
        self.is_armed = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if _owner(signal.getsignal(number)) is self:
                signal.signal(number, signal.SIG_DFL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.is_armed or number in self.came:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.came.add(number)
        raise StopRun("SIGTERM outside of training: nothing was saved", number)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.is_armed:
            self.came.add(number)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def came_early(number: int, handler: Any) -> bool:
    """Whether this handler, of before training, was given the signal and the run goes on."""
    owner = _owner(handler)
    return owner is not None and owner.is_armed and number in owner.came


def _acts_as_default(handler: Any) -> bool:
    """Whether nobody waits for the signal: also behind a run whose handler Lightning restored."""
    owner = _owner(handler)
    return handler is signal.SIG_DFL or (owner is not None and not owner.is_armed)


def _owner(handler: Any) -> EarlyStop | None:
    owner = handler.__self__ if inspect.ismethod(handler) else None
    return owner if isinstance(owner, EarlyStop) else None
