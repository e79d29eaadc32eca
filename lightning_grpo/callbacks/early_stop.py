"""SIGTERM before training begins: an exception in the main thread, as Ctrl-C is one.

The default action would end the process on the spot: ranks that it started would wait for it, and
whatever else is under way would be left as it is. Standard library only, for the command line.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from lightning_grpo.errors import StopRun


class EarlyStop:
    """Raises `StopRun` on the first SIGTERM; the second one ends the process at once.

    It takes the place of the default action only: a handler of somebody else's stays. SIGUSR1, a
    cluster's warning before the time limit, waits until training begins (`StopFlag`).
    """

    def __init__(self) -> None:
        self._armed = False

    def install(self) -> None:
        """From here on SIGTERM raises; only the main thread can have it so."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._stop)
            self._armed = True

    def uninstall(self) -> None:
        """SIGTERM is what it was, also where others have saved this handler and bring it back."""
        self._armed = False
        if threading.current_thread() is threading.main_thread():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        if signal.getsignal(signal.SIGTERM) == self._stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if not self._armed:
            os.kill(os.getpid(), number)
            return
        raise StopRun("SIGTERM outside of training: nothing was saved", number)
