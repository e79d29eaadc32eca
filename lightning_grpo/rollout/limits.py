"""The limits under which rollouts run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_grpo.errors import ConfigError


@dataclass(frozen=True)
class RolloutLimits:
    """How much runs at once, how long it may take, and how much may fail.

    Args:
        max_in_flight: Episodes that run at once (each has at most one request in flight, as a
            rule); None is `(max_staleness + 1) * batch_size * group_size`. Groups are let in whole.
        request_timeout_s: Longest time of one request to a server.
        reward_timeout_s: Longest time of one call of a reward; its process is killed then.
        reward_processes: Processes that run rewards; 0 runs them in-line, for a debugger.
        max_attempts: How often a prompt is tried before it counts as failed.
        max_failed_fraction: Of the last 10 batches' groups; above it the run ends with the first
            failure's traceback.
        max_filtered_batches: How many batches' worth of groups `keep_group` may turn down for one
            batch; then the groups it doesn't want fill the batch.
        straggler_policy: `wait` for a group at its last admissible version, or `drop` it (its
            prompt is asked again).
        straggler_timeout_s: Longest time that a batch waits for a group; it expires then, and the
            next prompt takes its place. None: as long as its requests take.
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

    def __post_init__(self) -> None:
        """Refuse what can't work."""
        at_least = {"max_attempts": 1, "reward_processes": 0, "max_filtered_batches": 0}
        for name, least in at_least.items():
            _require(vars(self)[name] >= least, f"`{name}` must be >= {least}", vars(self)[name])
        for name in (name for name in vars(self) if name.endswith("_timeout_s")):
            value = vars(self)[name]
            _require(value is None or value > 0, f"`{name}` must be > 0 seconds", value)
        _require(
            self.max_in_flight is None or self.max_in_flight >= 1,
            "`max_in_flight` must be >= 1, or null for all that the staleness allows",
            self.max_in_flight,
        )
        _require(
            0 <= self.max_failed_fraction <= 1,
            "`max_failed_fraction` must be between 0 and 1",
            self.max_failed_fraction,
        )
        _require(
            self.straggler_policy in ("wait", "drop"),
            "`straggler_policy` must be 'wait' or 'drop'",
            self.straggler_policy,
        )


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {value!r}.")
