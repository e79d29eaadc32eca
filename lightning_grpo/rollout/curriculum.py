"""Which prompts are asked again, by how they went before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from lightning_grpo.checks import MOST, require_number
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import Group, PromptKey


def unsolved(success: float) -> float:
    """1 - success: what was solved is asked less. Source: Kimi k1.5, arXiv 2501.12599."""
    return 1.0 - success


def undecided(success: float) -> float:
    """4 success (1 - success): most for prompts that are solved half of the time.

    Source: the learnability of arXiv 2502.12272, scaled to 1.
    """
    return 4.0 * success * (1.0 - success)


@dataclass(frozen=True)
class Curriculum:
    """Leaves prompts out of a pass by how often they were solved the last time they were asked.

    A prompt is asked with the probability that `priority` gives to its success, at least `least`;
    one that was never asked is always asked. The draws follow from the seed, the pass and the row.

    Args:
        priority: From the share of a group's completions that were right to a probability:
            `unsolved`, `undecided`, or a function of yours.
        least: Smallest probability, so that no prompt is forgotten.
        passing_reward: Reward from which a completion counts as right.
    """

    priority: Callable[[float], float] = unsolved
    least: float = 0.1
    passing_reward: float = 0.5

    def __post_init__(self) -> None:
        """Checks the settings."""
        require_number("curriculum.passing_reward", self.passing_reward, least=-MOST)
        if not 0 < self.least <= 1:
            raise ConfigError(
                "`curriculum.least` must be > 0 and <= 1 (a prompt's smallest probability to be "
                f"asked), got {self.least}. Way out: 0.1."
            )

    def success(self, group: Group) -> float:
        """The share of a group's completions that were right."""
        right = [t.reward >= self.passing_reward for t in group.trajectories]
        return sum(right) / len(right)

    def asks(self, key: PromptKey, success: float | None, seed: int = 0) -> bool:
        """Whether a prompt is asked in this pass.

        Args:
            key: The prompt.
            success: Of the last time it was asked; None: it was not.
            seed: Of the run.
        """
        if success is None:
            return True
        digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
        draw = int.from_bytes(digest, "big") / 2**64
        return draw < max(self.least, self.priority(success))
