"""A flag that a signal sets, and an exit that works even while the main thread is blocked."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

from lightning_grpo.callbacks.early_stop import came_early
from lightning_grpo.distributed.stops import ENDING, most_urgent


class StopFlag:
    """Own signal handlers that only set a flag; the second SIGTERM or SIGINT exits at once.

    Python runs a handler when the main thread is back in Python: not while it sits in a collective.
    So the interpreter also writes each signal's number into a socket at once
    (`signal.set_wakeup_fd`), and a thread reads from there.
    """

    def __init__(self) -> None:
        self._came: set[str] = set()
        self._first_at: float | None = None
        self._saved: dict[signal.Signals, Any] = {}
        self._old_wakeup = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def requested(self) -> str:
        """The name of the signal to act on, or an empty string."""
        return most_urgent(tuple(self._came))

    @property
    def age_s(self) -> float | None:
        """Seconds since the first signal; None if there was none."""
        return None if self._first_at is None else time.monotonic() - self._first_at

    @property
    def installed(self) -> bool:
        """Whether the handlers are in place."""
        return self._sockets is not None

    def install(self, names: Iterable[str]) -> None:
        """Take over these signals, with the flag down; only the main thread can."""
        if self.installed or threading.current_thread() is not threading.main_thread():
            return
        self._came, self._first_at = set(), None
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = (reader, writer)
        signals = {signal.Signals[name] for name in names}
        self._thread = threading.Thread(
            target=self._read, args=(reader, signals), name="grpo-signals", daemon=True
        )
        self._thread.start()
        self._old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._saved = {each: signal.signal(each, self._raise_flag) for each in signals}
        for each, before in self._saved.items():
            if came_early(each, before):
                self._raise_flag(each, None)

    def uninstall(self, *, exit_on_signal: bool = False) -> None:
        """Give the signals back to whom they were taken from; idempotent.

        A handler that somebody else has put in place meanwhile is left alone: Lightning gives its
        own back before callbacks are torn down.

        Args:
            exit_on_signal: Leave a handler that exits at once for SIGTERM and SIGINT instead, for
                a shutdown after which Lightning puts the original ones back.
        """
        if self._sockets is None or self._thread is None:
            return
        for each, handler in self._saved.items():
            if signal.getsignal(each) != self._raise_flag:
                continue
            leaving = exit_on_signal and each.name in ENDING
            signal.signal(each, _exit_now if leaving else handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_wakeup)
        reader, writer = self._sockets
        writer.close()
        self._thread.join(timeout=1.0)
        reader.close()
        self._sockets = self._thread = None
        self._saved = {}

    def _raise_flag(self, signum: int, frame: FrameType | None) -> None:
        self._first_at = self._first_at or time.monotonic()
        self._came.add(signal.Signals(signum).name)

    def _read(self, reader: socket.socket, signals: set[signal.Signals]) -> None:
        ending = 0
        while data := reader.recv(64):
            for number in data:
                if number not in signals:
                    continue
                self._raise_flag(number, None)
                ending += signal.Signals(number).name in ENDING
                if ending > 1:
                    _exit_now(number, None)


def _exit_now(signum: int, frame: FrameType | None) -> None:
    """Leave without another word to anyone; the shell's status for that signal."""
    sys.stderr.write(f"second signal ({signal.Signals(signum).name}): exiting at once\n")
    sys.stderr.flush()
    os._exit(128 + signum)
