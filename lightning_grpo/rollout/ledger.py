"""The limits of a run, its ledger of prompts, and the counters that are logged."""

from __future__ import annotations

import itertools
import logging
import resource
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import psutil

from lightning_grpo.errors import (
    ConfigError,
    FailureBudgetError,
    RolloutError,
    require_count,
    require_number,
    require_seconds,
)
from lightning_grpo.types import Group, Outcome, PromptKey

logger = logging.getLogger(__name__)

# -- limits ----------------------------------------------------------------------------------------

SPARE_FILES = 96
"""What a run opens after its start beside connections: logs, checkpoints, rewards' processes."""

FILES_PER_SERVER = 4
"""Its pipes, its health check, its weights."""

MOST_FILES = 1 << 20
"""Nobody needs more, and a hard limit may be infinite."""

MOST_PROCESSES = 4096
_AT_LEAST = {"max_attempts": 1, "max_filtered_batches": 0, "max_server_restarts": 0}


@dataclass(frozen=True)
class RolloutLimits:
    """How much runs at once, how long it may take, and how much may fail.

    Args:
        max_in_flight: Episodes that run at once (each has at most one request in flight, as a
            rule); None is `(max_staleness + 1) * batch_size * group_size`. Groups are let in whole.
        request_timeout_s: Longest that a request is left to one server. It is called back before,
            if it is late by its tokens and the speed seen, and goes on with what it has.
        reward_timeout_s: Longest time of one call of a reward; its process is killed then.
        reward_processes: Processes that run rewards; 0 runs them in-line, for a debugger.
        max_attempts: How often a prompt is tried before it counts as failed.
        max_failed_fraction: Of the last 10 batches' groups; above it the run ends with the first
            failure and the line that raised it.
        max_filtered_batches: How many batches' worth of groups `keep_group` may turn down for one
            batch; then the groups it doesn't want fill the batch.
        straggler_policy: `wait` for a group at its last admissible version, or `drop` it (its
            prompt is asked again).
        straggler_timeout_s: Longest time that a batch waits for a group; it expires then, and the
            next prompt takes its place. None: as long as its requests take.
        rank_timeout_s: Silence of a rank after which it counts as lost.
        server_timeout_s: How long a server that is not this machine's own may be silent, or fail to
            prove its weights; it is asked again meanwhile. Then it is started again where the run
            may do that; else it is lost, and comes back when it answers. Of a `ServerList` also how
            long the run waits while no server can be used.
        max_server_restarts: How often a server may die, or send what can't be, before it is lost;
            each time is forgotten after a minute of service in which it answered.
    """

    max_in_flight: int | None = None
    request_timeout_s: float = 600.0
    reward_timeout_s: float = 15.0
    reward_processes: int = 2
    max_attempts: int = 3
    max_failed_fraction: float = 0.1
    max_filtered_batches: int = 3
    straggler_policy: Literal["wait", "drop"] = "wait"
    straggler_timeout_s: float | None = None
    rank_timeout_s: float = 60.0
    server_timeout_s: float = 300.0
    max_server_restarts: int = 3

    def __post_init__(self) -> None:
        """Refuse what can't work."""
        for name, least in _AT_LEAST.items():
            require_count(name, vars(self)[name], least)
        for name in (name for name in vars(self) if name.endswith("_timeout_s")):
            if vars(self)[name] is not None:
                require_seconds(name, vars(self)[name])
        if self.max_in_flight is not None:
            require_number(
                "max_in_flight",
                self.max_in_flight,
                least=1,
                whole=True,
                way_out="Null is for all that the staleness allows.",
            )
        require_count("reward_processes", self.reward_processes, 0, MOST_PROCESSES)
        require_number("max_failed_fraction", self.max_failed_fraction, least=0, most=1)
        if self.straggler_policy not in ("wait", "drop"):
            raise ConfigError(
                f"`straggler_policy` must be 'wait' or 'drop', got {self.straggler_policy!r}."
            )


def raise_file_limit() -> int:
    """Raise the soft limit of open files as far as the hard one allows; how many may be open then.

    What is started afterwards has it, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def room_for_connections(wanted: int, num_servers: int, most_files: int) -> int:
    """How many requests may be in flight with the files that this process may open.

    Args:
        wanted: Requests that are to be in flight.
        num_servers: Each is asked for its health, and gets weights, beside them.
        most_files: That may be open at once, these included.

    Raises:
        ConfigError: There is room for none.
    """
    others = psutil.Process().num_fds() + SPARE_FILES + FILES_PER_SERVER * num_servers
    room = most_files - others
    needed = (
        f"this process may open {most_files} files (`ulimit -Hn`), {wanted + others} are needed for"
        f" {wanted} requests in flight and {num_servers} servers"
    )
    way_out = f"Raise it before the start (`ulimit -n {wanted + others}`)"
    if room < 1:
        raise ConfigError(f"{needed}. {way_out}.")
    if room < wanted:
        logger.warning(
            "%s: %d are sent at once. %s, or lower `limits.max_in_flight`.", needed, room, way_out
        )
    return room


# -- counters and ledger ---------------------------------------------------------------------------


@dataclass
class Counters:
    """Totals since the start of the run; they go on after a resume.

    Attributes:
        taken: Groups handed to the trainer.
        tokens: Tokens sampled by groups that completed, filtered ones included.
        filtered: Groups that `keep_group` turned down and that were replaced.
        filled: Groups that `keep_group` didn't want but that filled a batch.
        retried: Attempts that failed and were tried again.
        failed: Prompts that failed for good.
        expired: Prompts that a batch waited too long for.
        skipped: Prompts that the curriculum left out of a pass.
        dropped_groups: Groups that became too old; their prompts were asked again.
        dropped_tokens: Tokens of their completed requests.
        max_staleness_seen: Largest staleness of a group that was taken.
    """

    taken: int = 0
    tokens: int = 0
    filtered: int = 0
    filled: int = 0
    retried: int = 0
    failed: int = 0
    expired: int = 0
    skipped: int = 0
    dropped_groups: int = 0
    dropped_tokens: int = 0
    max_staleness_seen: int = 0

    def took(self, groups: Sequence[Group], version: int) -> None:
        """Count a batch that is trained at `version`."""
        self.taken += len(groups)
        oldest = min(group.oldest_version for group in groups)
        self.max_staleness_seen = max(self.max_staleness_seen, version - oldest)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for each in fields(self):
            setattr(self, each.name, int(state[each.name]))


LOGGED = {
    "rollout/filtered": "filtered",
    "rollout/filled": "filled",
    "rollout/failed": "failed",
    "rollout/retried": "retried",
    "rollout/expired": "expired",
    "rollout/skipped": "skipped",
    "staleness/dropped_groups": "dropped_groups",
    "staleness/dropped_tokens": "dropped_tokens",
}
"""Metric -> the counter that it is of."""

WINDOW_BATCHES = 10
"""The failure rate is taken over this many batches' groups."""

MAX_FIRST_FAILURES = 8
"""A run whose first groups all fail (a batch of them, at most this many) ends at once."""

_Pass = tuple[int, int]  # (dataset, pass over it)
_CODES = {outcome: code for code, outcome in enumerate(Outcome, start=1)}
_OUTCOMES = {code: outcome for outcome, code in _CODES.items()}


class Ledger:
    """Records how each prompt of the stream ended.

    A pass over a dataset takes one byte per row while it is open, and a few counters once every row
    has ended.

    Args:
        sizes: Rows of each dataset; in keys they are counted end to end.
        batch_size: Groups of one rollout batch.
        max_failed_fraction: Of the last 10 batches' groups; above it `record` raises, and always
            when all of them failed.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int = 1, max_failed_fraction: float = 1.0
    ) -> None:
        if min(sizes, default=0) < 1:
            raise ConfigError(f"a ledger needs at least one prompt, got {list(sizes)}.")
        self.sizes = list(sizes)
        self.max_failed_fraction = max_failed_fraction
        self.num_first = min(batch_size, MAX_FIRST_FAILURES)
        self.counts: Counter[Outcome] = Counter()
        self.first_failure: str | None = None
        self._starts = [0, *itertools.accumulate(sizes)]
        self._open: dict[_Pass, bytearray] = {}
        self._closed: dict[_Pass, dict[str, int]] = {}
        self._success: dict[int, float] = {}
        self._window: deque[bool] = deque(maxlen=WINDOW_BATCHES * batch_size)

    def record(
        self,
        key: PromptKey,
        outcome: Outcome,
        error: str | None = None,
        success: float | None = None,
        *,
        asked: bool = True,
    ) -> None:
        """Write the one final outcome of a prompt.

        Args:
            key: The prompt.
            outcome: How it ended.
            error: Why it failed, with the line that raised it.
            success: How often it was answered rightly, to be remembered for the next pass.
            asked: Whether it was asked at all; a row that is no prompt says nothing of the rest.

        Raises:
            RolloutError: The prompt already has an outcome.
            FailureBudgetError: Too many failed; ends with the first failure.
        """
        self._write(key, outcome)
        if success is not None:
            self._success[key[1]] = success
        self.counts[outcome] += 1
        self._window.append(outcome is Outcome.FAILED)
        if outcome is Outcome.FAILED and self.first_failure is None:
            self.first_failure = f"prompt {key}: {error or 'no error was given'}"
        self._check_budget(asked)

    def skip(self, key: PromptKey) -> None:
        """A prompt is left out of its pass; it neither worked nor failed."""
        self._write(key, Outcome.SKIPPED)

    def success(self, row: int) -> float | None:
        """How often a row was answered rightly the last time that it was asked."""
        return self._success.get(row)

    def outcome(self, key: PromptKey) -> Outcome | str | None:
        """How a prompt ended; `"ended"` in a pass that is over; None while it is open."""
        place, row = self._place(key)
        if place in self._closed:
            return "ended"
        rows = self._open.get(place)
        return None if rows is None else _OUTCOMES.get(rows[row])

    def summary(self, pass_index: int) -> dict[str, int]:
        """How many prompts of a pass ended in which way, over all datasets."""
        total = {str(outcome): 0 for outcome in _CODES}
        for dataset in range(len(self.sizes)):
            for outcome, count in self._count((dataset, pass_index)).items():
                total[outcome] += count
        return total

    @property
    def num_ended(self) -> int:
        """Prompts that were asked and have an outcome, over all passes."""
        return self.counts.total()

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "counts": {str(outcome): count for outcome, count in self.counts.items()},
            "open": [[*place, bytes(rows)] for place, rows in self._open.items()],
            "closed": [[*place, dict(counts)] for place, counts in self._closed.items()],
            "success": dict(self._success),
            "window": bytes(self._window),
            "first_failure": self.first_failure,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.counts = Counter({Outcome(name): int(n) for name, n in state["counts"].items()})
        self._open = {(int(d), int(p)): bytearray(rows) for d, p, rows in state["open"]}
        self._closed = {(int(d), int(p)): dict(counts) for d, p, counts in state["closed"]}
        self._success = {int(row): float(value) for row, value in state["success"].items()}
        self._window.clear()
        self._window.extend(bool(failed) for failed in state["window"])
        if self._is_exhausted:  # it ended the run, and whoever goes on has mended the cause
            self._window.clear()
        self.first_failure = state["first_failure"]

    def _write(self, key: PromptKey, outcome: Outcome) -> None:
        earlier = self.outcome(key)
        if earlier is not None:
            raise RolloutError(f"prompt {key} ended twice: {earlier}, then {outcome}.")
        place, row = self._place(key)
        rows = self._open.setdefault(place, bytearray(self.sizes[place[0]]))
        rows[row] = _CODES[outcome]
        if 0 not in rows:
            self._closed[place] = self._count(place)
            del self._open[place]

    def _place(self, key: PromptKey) -> tuple[_Pass, int]:
        pass_index, row = key
        if not 0 <= row < self._starts[-1]:
            raise RolloutError(f"prompt {key} is not one of the {self._starts[-1]} rows.")
        dataset = bisect_right(self._starts, row) - 1
        return (dataset, pass_index), row - self._starts[dataset]

    def _count(self, place: _Pass) -> dict[str, int]:
        if place in self._closed:
            return dict(self._closed[place])
        rows = self._open.get(place, bytearray())
        return {str(outcome): rows.count(code) for code, outcome in _OUTCOMES.items()}

    @property
    def _is_exhausted(self) -> bool:
        failed, size = sum(self._window), self._window.maxlen or 1
        return failed > self.max_failed_fraction * size or failed == size

    def _check_budget(self, asked: bool) -> None:
        failed = sum(self._window)
        if asked and self.counts[Outcome.FAILED] == self.num_ended and failed >= self.num_first:
            raise FailureBudgetError(
                f"The first {failed} groups all failed; nothing has worked yet. "
                f"First failure: {self.first_failure}"
            )
        if self._is_exhausted:
            size = self._window.maxlen
            raise FailureBudgetError(
                f"{failed} of the last {len(self._window)} groups failed, more than "
                f"`max_failed_fraction` ({self.max_failed_fraction:g}) of {size} allows. "
                f"First failure: {self.first_failure}"
            )
