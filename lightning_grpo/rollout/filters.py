"""Which groups are worth training on (dynamic sampling)."""

from __future__ import annotations

from collections.abc import Callable

from lightning_grpo.types import Group


def has_variance(group: Group) -> bool:
    """Whether the rewards of a group differ: without it every advantage of the group is 0."""
    rewards = [trajectory.reward for trajectory in group.trajectories]
    return max(rewards) > min(rewards)


class GroupFilter:
    """Turns groups down until the cost of one batch's replacements is used up.

    Args:
        keep_group: Whether a group is worth training on; None keeps all.
        max_filtered: Groups that may be turned down for one batch.
    """

    def __init__(self, keep_group: Callable[[Group], bool] | None, max_filtered: int) -> None:
        self.keep_group = keep_group
        self.max_filtered = max_filtered
        self.num_filtered = 0

    def wants(self, group: Group) -> bool:
        """What `keep_group` says."""
        return self.keep_group is None or bool(self.keep_group(group))

    def may_turn_down(self) -> bool:
        """Whether one more replacement is within the cost; counts it if so."""
        if self.num_filtered >= self.max_filtered:
            return False
        self.num_filtered += 1
        return True

    def start_batch(self) -> None:
        """A batch was taken: the next one has its own cost."""
        self.num_filtered = 0
