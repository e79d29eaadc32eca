"""One final outcome for each (pass, row), and when too many failed to go on."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from lightning_grpo.errors import ConfigError, FailureBudgetError, RolloutError
from lightning_grpo.types import Outcome, PromptKey

WINDOW_BATCHES = 10
"""The failure rate is taken over this many batches' groups."""

MAX_FIRST_FAILURES = 8
"""A run whose first groups all fail (a batch of them, at most this many) ends at once."""

_CODES = {outcome: code for code, outcome in enumerate(Outcome, start=1)}
_OUTCOMES = {code: outcome for outcome, code in _CODES.items()}


class Ledger:
    """Records how each prompt of the stream ended.

    A pass takes one byte per row while it is open, and four counters once every row has ended.

    Args:
        num_rows: Prompts of one pass.
        batch_size: Groups of one rollout batch.
        max_failed_fraction: Of the last 10 batches' groups; above it `record` raises, and always
            when all of them failed.
    """

    def __init__(
        self, num_rows: int, batch_size: int = 1, max_failed_fraction: float = 1.0
    ) -> None:
        if num_rows < 1:
            raise ConfigError(f"a ledger needs at least one prompt, got {num_rows}.")
        self.num_rows = num_rows
        self.max_failed_fraction = max_failed_fraction
        self.num_first = min(batch_size, MAX_FIRST_FAILURES)
        self.counts: Counter[Outcome] = Counter()
        self.first_failure: str | None = None
        self._open: dict[int, bytearray] = {}
        self._closed: dict[int, dict[str, int]] = {}
        self._window: deque[bool] = deque(maxlen=WINDOW_BATCHES * batch_size)

    def record(self, key: PromptKey, outcome: Outcome, error: str | None = None) -> None:
        """Write the one final outcome of a prompt.

        Args:
            key: The prompt.
            outcome: How it ended.
            error: Why it failed, with the traceback.

        Raises:
            RolloutError: The prompt already has an outcome.
            FailureBudgetError: Too many failed; ends with the first failure's traceback.
        """
        earlier = self.outcome(key)
        if earlier is not None:
            raise RolloutError(f"prompt {key} ended twice: {earlier}, then {outcome}.")
        pass_index, row = key
        if not 0 <= row < self.num_rows:
            raise RolloutError(f"prompt {key} is not one of the {self.num_rows} rows.")
        rows = self._open.setdefault(pass_index, bytearray(self.num_rows))
        rows[row] = _CODES[outcome]
        if 0 not in rows:
            self._close(pass_index)
        self.counts[outcome] += 1
        self._window.append(outcome is Outcome.FAILED)
        if outcome is Outcome.FAILED and self.first_failure is None:
            self.first_failure = f"prompt {key}: {error or 'no error was given'}"
        self._check_budget()

    def outcome(self, key: PromptKey) -> Outcome | str | None:
        """How a prompt ended; `"ended"` in a pass that is over; None while it is open."""
        pass_index, row = key
        if pass_index in self._closed:
            return "ended"
        rows = self._open.get(pass_index)
        code = rows[row] if rows is not None and 0 <= row < self.num_rows else 0
        return _OUTCOMES.get(code)

    def summary(self, pass_index: int) -> dict[str, int]:
        """How many prompts of a pass ended in which way."""
        if pass_index in self._closed:
            return dict(self._closed[pass_index])
        rows = self._open.get(pass_index, bytearray())
        return {str(outcome): rows.count(code) for code, outcome in _OUTCOMES.items()}

    @property
    def num_ended(self) -> int:
        """Prompts with an outcome, over all passes."""
        return self.counts.total()

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "num_rows": self.num_rows,
            "counts": {str(outcome): count for outcome, count in self.counts.items()},
            "open": {index: bytes(rows) for index, rows in self._open.items()},
            "closed": {index: dict(counts) for index, counts in self._closed.items()},
            "window": bytes(self._window),
            "first_failure": self.first_failure,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.counts = Counter({Outcome(name): int(n) for name, n in state["counts"].items()})
        self._open = {int(index): bytearray(rows) for index, rows in state["open"].items()}
        self._closed = {int(index): dict(counts) for index, counts in state["closed"].items()}
        self._window.clear()
        self._window.extend(bool(failed) for failed in state["window"])
        self.first_failure = state["first_failure"]

    def _close(self, pass_index: int) -> None:
        self._closed[pass_index] = self.summary(pass_index)
        del self._open[pass_index]

    def _check_budget(self) -> None:
        failed = sum(self._window)
        if self.counts[Outcome.FAILED] == self.num_ended and failed >= self.num_first:
            raise FailureBudgetError(
                f"The first {failed} groups all failed; nothing has worked yet. "
                f"First failure: {self.first_failure}"
            )
        size = self._window.maxlen or 1
        if failed > self.max_failed_fraction * size or failed == size:
            raise FailureBudgetError(
                f"{failed} of the last {len(self._window)} groups failed, more than "
                f"`max_failed_fraction` ({self.max_failed_fraction:g}) of {size} allows. "
                f"First failure: {self.first_failure}"
            )
