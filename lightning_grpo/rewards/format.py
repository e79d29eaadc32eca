"""Rewards for the form of a completion; each also serves as an example of a reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lightning_grpo.rewards.final_answer import MARK


def marks_answer(completion: str) -> float:
    """1.0 if the completion marks its answer with exactly one `####` in its last line."""
    lines = completion.rstrip().splitlines() or [""]
    return float(completion.count(MARK) == 1 and MARK in lines[-1])


def boxes_answer(completion: str) -> float:
    r"""1.0 if the completion puts something into a `\boxed{}`."""
    return float(re.search(r"\\boxed\{\s*[^\s{}]", completion) is not None)


def has_tags(tags: Sequence[str] = ("think", "answer")) -> Callable[[str], float]:
    """A reward: 1.0 if the completion is `<tag>...</tag>` for each tag in order and nothing else.

    Args:
        tags: Names, in the order in which they must come.
    """

    def tags_in_order(completion: str) -> float:
        rest = completion.strip()
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            content, found, after = rest.removeprefix(opening).partition(closing)
            if not rest.startswith(opening) or not found or opening in content:
                return 0.0
            rest = after.lstrip()
        return float(not rest)

    return tags_in_order
