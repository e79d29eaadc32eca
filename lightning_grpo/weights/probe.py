"""Proof that servers hold the weights that were sent: a few sequences scored on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_grpo.errors import WeightSyncError

Scores = Sequence[Sequence[float]]
"""Logprobs of each probe sequence, `[sequences][tokens]`; entry 0 of a sequence says nothing."""

EXACT_LIMIT = 1e-4
"""Mean |dlogprob| that two fp32 implementations of the same weights stay below."""
FIRST_LIMIT = 0.2
"""Largest first reading in a lower precision; other weights of one model differ by about 1."""
BASELINE_FACTOR = 3.0
FLOAT_NOISE = 1e-5
"""A change of the trainer's scores below this could be rounding."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is scored, and how close both sides must come.

    Attributes:
        sequences: Token ids, fixed for the run.
        exact: Trainer and servers both compute in fp32.
    """

    sequences: tuple[tuple[int, ...], ...]
    exact: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """One comparison, all in mean |dlogprob|.

    Attributes:
        diff: Server against trainer.
        change: Trainer against itself at the previous version; None at the first.
        server_change: Server against itself at the previous version; None at the first.
    """

    diff: float
    change: float | None = None
    server_change: float | None = None


class ProbeRecord:
    """Remembers each server's readings; alarms are relative to its own first one."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._baseline: dict[str, float] = {}
        self._last: dict[str, tuple[Scores, Scores]] = {}

    def forget(self, url: str) -> None:
        """The server was replaced: what it scored before says nothing about it."""
        self._last.pop(url, None)

    def agrees(self, expected: Scores, scores: Scores) -> bool:
        """Whether the server's scores look like these weights, without a history."""
        return mean_difference(expected, scores) <= self._limit(None)

    def check(self, url: str, version: int, expected: Scores, scores: Scores) -> Reading:
        """Takes a reading after an update.

        Raises:
            WeightSyncError: The server's weights are not the ones that were sent.
        """
        reading = self._read(url, expected, scores)
        baseline = self._baseline.get(url)
        limit = self._limit(baseline)
        if not reading.diff <= limit:
            raise WeightSyncError(
                f"{url} does not hold version {version}: its logprobs differ from the trainer's by"
                f" {reading.diff:.3g} on average, at most {limit:.3g} is rounding."
            )
        if self._stuck(reading, baseline):
            raise WeightSyncError(
                f"{url} took version {version} but did not change: the trainer's logprobs moved by"
                f" {reading.change:.3g} on average, the server's not at all."
            )
        self._baseline.setdefault(url, reading.diff)
        self._last[url] = (expected, scores)
        return reading

    def _read(self, url: str, expected: Scores, scores: Scores) -> Reading:
        diff = mean_difference(expected, scores)
        if url not in self._last:
            return Reading(diff)
        last_expected, last_scores = self._last[url]
        return Reading(
            diff, mean_difference(last_expected, expected), mean_difference(last_scores, scores)
        )

    def _limit(self, baseline: float | None) -> float:
        if self.probe.exact:
            return EXACT_LIMIT
        return FIRST_LIMIT if baseline is None else max(BASELINE_FACTOR * baseline, 1e-3)

    def _stuck(self, reading: Reading, baseline: float | None) -> bool:
        """A server that scores the same to the last bit computes with the same weights.

        The trainer may move by less than the serving dtype resolves; only a change that must show
        counts.
        """
        if reading.change is None or reading.server_change != 0.0:
            return False
        must_show = FLOAT_NOISE if self.probe.exact else max(FLOAT_NOISE, (baseline or 0.0))
        return reading.change > must_show


def require_finite(scores: Scores) -> None:
    """Refuse to publish a policy that a step has broken: no server is to blame for it.

    Raises:
        WeightSyncError: The trainer's own logprobs are not numbers.
    """
    if not all(math.isfinite(logprob) for row in scores for logprob in row):
        raise WeightSyncError(
            "the policy's logprobs are not finite: a step with an infinite or undefined gradient "
            "has broken its weights. Look at `policy/loss` and `policy/grad_norm`, and go on from "
            "an earlier checkpoint."
        )


def mean_difference(left: Scores, right: Scores) -> float:
    """Mean |left - right| over all tokens but the first of each sequence."""
    pairs = [
        (a, b)
        for left_row, right_row in zip(left, right, strict=True)
        for a, b in list(zip(left_row, right_row, strict=True))[1:]
    ]
    return sum(abs(a - b) for a, b in pairs) / max(1, len(pairs))
