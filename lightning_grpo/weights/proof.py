"""The proof that servers hold what was sent, and that what was sent is what trains.

Two comparisons that prove a weight sync: a few sequences scored by three parties.

The *server* must hold what was sent: its scores are compared with those of the very tensors that
travel. What was *sent* must be what trains: its scores are compared with the policy's. Both may
differ by rounding, which is measured on the weights at hand and never guessed, so that the limits
are tight at any size and in any precision.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning_grpo.errors import GRPOError, WeightSyncError
from lightning_grpo.weights.transport import UpdateClient

Scores = Sequence[Sequence[float]]
"""Logprobs of each probe sequence, `[sequences][tokens]`; entry 0 of a sequence says nothing."""

FACTOR = 2.5
"""A mean difference this many times what rounding explains is none (see `benchmarks/proof.py`)."""
STRETCH_TOKENS, STRETCH_FACTOR = 32, 6.0
"""So many limits at most in any stretch: an error that begins at some length shows there."""
FLOORS: Mapping[str, float] = {"float32": 2e-5, "float16": 5e-4, "bfloat16": 2e-3, "fp8": 2e-2}
"""What always passes, by the coarsest precision: a confident policy's scores hardly round."""

KINDS = {"half": "float16", "float": "float32", "auto": "bfloat16", "unknown": "bfloat16"}
"""What servers call precisions otherwise."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is scored.

    Attributes:
        sequences: Token ids, fixed for the run.
        thorough: Further sequences for the first proof of each server: long ones, on both sides
            of whatever depends on the length (windows, RoPE that switches).
    """

    sequences: tuple[tuple[int, ...], ...]
    thorough: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Rounding:
    """How far scores move by rounding alone, mean |dlogprob|, measured on a run's own weights.

    Attributes:
        compute: By computing in a precision (`float32`, `bfloat16`, `fp8`, ...).
        weights: By rounding the weights to the dtype in which they travel.
    """

    compute: Mapping[str, float] = field(default_factory=dict)
    weights: float = 0.0

    def between(self, *kinds: str) -> float:
        """The difference of two computations in these precisions with the same weights."""
        return math.hypot(*(self.compute.get(kind, 0.0) for kind in kinds))


@dataclass(frozen=True)
class SentScores:
    """What the tensors that travel score.

    Attributes:
        scores: Of the probe's sequences, those of a thorough proof behind the others.
        kind: The precision that they were scored in.
        rounding: Measured on these weights, or on earlier ones that are close.
    """

    scores: Scores
    kind: str = "float32"
    rounding: Rounding = Rounding()


@dataclass(frozen=True, slots=True)
class Reading:
    """One comparison, all in mean |dlogprob|.

    Attributes:
        diff: Of the two sides.
        limit: What rounding explains at most.
        change: What was sent against what was sent before; None at the first.
        server_change: The server against itself at the version before; None at the first.
    """

    diff: float
    limit: float
    change: float | None = None
    server_change: float | None = None


class ServerProof:
    """Comparison (a): every server holds what was sent."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._last: dict[str, tuple[Scores, Scores]] = {}

    def forget(self, url: str) -> None:
        """Drop what a server scored before it was replaced."""
        self._last.pop(url, None)

    def sequences_for(self, url: str) -> tuple[tuple[int, ...], ...]:
        """What a server is asked to score; a first proof is thorough."""
        known = url in self._last
        return self.probe.sequences if known else self.probe.sequences + self.probe.thorough

    def agrees(self, sent: SentScores, scores: Scores, kind: str) -> bool:
        """Tell whether a server seems to hold the weights that were scored, without a history."""
        limit = _server_limit(sent, kind)
        return not misfit(sent.scores, scores, limit)

    def check(self, url: str, version: int, sent: SentScores, scores: Scores, kind: str) -> Reading:
        """Compare what a server scores after an update.

        Args:
            url: The server.
            version: Of the weights.
            sent: What they score.
            scores: What the server scores.
            kind: The server's precision, by its own name.

        Raises:
            WeightSyncError: It holds other weights than were sent.
        """
        limit = _server_limit(sent, kind)
        expected = sent.scores[: len(scores)]
        fault = misfit(expected, scores, limit)
        change = server_change = None
        if url in self._last:
            before, server_before = self._last[url]
            change = mean_difference(before, expected)
            server_change = mean_difference(server_before, scores)
            if server_change == 0.0 and change > limit / FACTOR:
                fault = fault or (
                    f"its logprobs are the same to the last bit as before, theirs moved by "
                    f"{change:.3g} on average. It has kept old weights"
                )
        if fault:
            raise WeightSyncError(
                f"{url} holds other weights than were sent as version {version}: {fault}."
            )
        self._last[url] = (expected, scores)
        return Reading(mean_difference(expected, scores), limit, change, server_change)


def check_policy(
    version: int, sent: SentScores, policy: Scores, kind: str, *, merged: bool = False
) -> float:
    """Comparison (b): what was sent is what trains.

    Args:
        version: Of the weights.
        sent: What the tensors that travelled score.
        policy: What the policy scores under the same weights, by the pass that trains.
        kind: The policy's precision.
        merged: Whether adapters were merged into what was sent: then it was rounded by chance,
            by twice as much.

    Returns:
        Mean |dlogprob|.

    Raises:
        WeightSyncError: What was sent is not what trains.
    """
    # A policy that computes in the wire's own dtype rounds its weights just as they were sent.
    weights = 0.0 if kind == sent.kind and not merged else sent.rounding.weights * (1 + merged)
    noise = math.hypot(sent.rounding.between(sent.kind, kind), weights)
    scores = sent.scores[: len(policy)]
    if fault := misfit(scores, policy, limit_of(noise, sent.kind, kind)):
        raise WeightSyncError(
            f"what was sent to the servers as version {version} is not what trains: {fault}. "
            "An adapter that was left out, a wrong merge or a stale copy look like this; the "
            "servers are not at fault. A policy of your own (`build_policy`, wrappers) must keep "
            "the parameters that the servers' model has."
        )
    return mean_difference(scores, policy)


def kind_of(name: str) -> str:
    """The precision that a server's name for it means."""
    kind = KINDS.get(name, name)
    return kind if kind in FLOORS else "fp8"


def limit_of(noise: float, *kinds: str) -> float:
    """The largest mean difference that counts as rounding."""
    return max(*(FLOORS[kind] for kind in kinds), FACTOR * noise)


def misfit(expected: Scores, scores: Scores, limit: float) -> str:
    """Say how two sides differ by more than rounding, on average or in a stretch; else nothing."""
    diff = mean_difference(expected, scores)
    if not diff <= limit:
        return f"logprobs differ by {diff:.3g} on average, at most {limit:.3g} is rounding"
    most = STRETCH_FACTOR * limit
    for row, start, diff in _stretches(expected, scores):
        if not diff <= most:
            return (
                f"logprobs differ by {diff:.3g} on average from token {start} of a sequence of "
                f"{len(expected[row])} on, at most {most:.3g} is rounding"
            )
    return ""


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
    moves = [abs(move) for move in _pairs(left, right)]
    return sum(moves) / max(1, len(moves))


def _pairs(left: Scores, right: Scores) -> Iterator[float]:
    """The second minus the first, token by token but for the first of each sequence."""
    for left_row, right_row in zip(left, right, strict=False):
        for a, b in list(zip(left_row, right_row, strict=True))[1:]:
            yield b - a


def _stretches(left: Scores, right: Scores) -> Iterator[tuple[int, int, float]]:
    """Mean |left - right| in stretches of each sequence: `(sequence, first token, mean)`."""
    for index, (left_row, right_row) in enumerate(zip(left, right, strict=False)):
        row = [abs(a - b) for a, b in zip(left_row, right_row, strict=True)][1:]
        for start in range(0, len(row), STRETCH_TOKENS):
            stretch = row[start : start + STRETCH_TOKENS]
            yield index, start + 1, sum(stretch) / len(stretch)


def _server_limit(sent: SentScores, kind: str) -> float:
    kind = kind_of(kind)
    return limit_of(sent.rounding.between(sent.kind, kind), sent.kind, kind)


T = TypeVar("T")
Sent = SentScores | Future[SentScores]
"""The expected scores, or a future of them, which the trainer sets while the weights travel."""


class TrainerFailedError(GRPOError, RuntimeError):
    """What the trainer promised will not come: no server is to blame."""


@contextmanager
def promised(*promises: Future[Any]) -> Iterator[None]:
    """An error in here breaks what was not set yet: nobody waits for it in vain.

    Whoever waits gets a `TrainerFailedError` of it: a signal's `SystemExit` would end the event
    loop.
    """
    try:
        yield
    except BaseException as error:
        for promise in promises:
            if not promise.done():
                broken = TrainerFailedError(f"the trainer failed: {error!r}")
                broken.__cause__ = error
                promise.set_exception(broken)
        raise


def require_trainer(promise: Any) -> None:
    """Raises the `TrainerFailedError` of a promise that is broken."""
    if isinstance(promise, Future) and promise.done():
        promise.result()


async def settled(given: T | Future[T]) -> T:
    """The value; a deadline that passes meanwhile leaves a future to whoever sets it."""
    if isinstance(given, Future):
        return await asyncio.shield(asyncio.wrap_future(given))
    return given


async def scores_of(
    client: UpdateClient, sequences: Sequence[Sequence[int]], extra_key: str, timeout_s: float
) -> list[list[float]]:
    """What a server gives each token of the sequences, `[sequences][tokens]`."""
    asked = [client.score(list(ids), extra_key=extra_key, timeout_s=timeout_s) for ids in sequences]
    return list(await asyncio.gather(*asked))
