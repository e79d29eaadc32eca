"""The garbage collector's share of a run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

SHARE = 0.02
"""Of the time may go into looks at the whole heap."""
OLDEST = 2
"""The generation that holds what lives long."""
NOT_NOW = 1 << 30


class QuietHeap:
    """Spares the collector what stands when training starts, for it stays until the end.

    That is half a million objects. To look through them again and again took two fifths of the
    rollout client's time beside a server that answers at once (70 to 42 ms for 128 samples), and
    each look stops the trainer's thread as well. Ten thousand requests in flight are a million
    objects more, of which a look finds hardly any to be garbage: so looks at all of them are made
    as seldom as they are slow.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._frozen = False
        self._thresholds = gc.get_threshold()
        self._began = self._next = 0.0

    def freeze(self) -> None:
        """Collect what is garbage by now, and leave the rest alone from here on; once."""
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._thresholds = gc.get_threshold()
            gc.callbacks.append(self.space_out)
            self._frozen = True

    def thaw(self) -> None:
        """Let the collector see everything again."""
        if self._frozen:
            gc.callbacks.remove(self.space_out)
            gc.set_threshold(*self._thresholds)
            gc.unfreeze()
            self._frozen = False

    def space_out(self, phase: str, info: Mapping[str, Any]) -> None:
        """For `gc.callbacks`: the slower the last look at all was, the later the next."""
        now = self._clock()
        if phase == "start":
            self._began = now
        elif info["generation"] == OLDEST:
            self._next = now + (now - self._began) / SHARE
            young, middle, _ = self._thresholds
            gc.set_threshold(young, middle, NOT_NOW)
        elif now >= self._next:
            gc.set_threshold(*self._thresholds)
