"""What the producer counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_grpo.types import Group


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


def metrics(counters: Counters, status: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of the producer, under its names.

    Args:
        counters: The producer's.
        status: Its `status()`.
    """
    return {
        "rollout/pass": float(status["pass"]),
        "rollout/in_flight": float(status["in_flight"]),
        "rollout/queued": float(status["queued"]),
        "rollout/filtered": float(counters.filtered),
        "rollout/filled": float(counters.filled),
        "rollout/failed": float(counters.failed),
        "rollout/retried": float(counters.retried),
        "rollout/expired": float(counters.expired),
        "rollout/skipped": float(counters.skipped),
        "staleness/dropped_groups": float(counters.dropped_groups),
        "staleness/dropped_tokens": float(counters.dropped_tokens),
    }


def explain_wait(status: Mapping[str, Any]) -> str:
    """One line on why a batch isn't ready.

    Args:
        status: The producer's `status()`.
    """
    errors = "; ".join(status["last_errors"]) or "none"
    return (
        f"no accepted group for {status['idle_s']:.0f} s at version {status['version']}: "
        f"{status['running']} groups running, {status['queued']} finished, "
        f"{status['unpublished_batches']} batch(es) whose weights are not out; "
        f"last errors: {errors}"
    )
