"""Rewards for the form of a completion; each also serves as an example of a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_grpo.rewards.boxed_answer import last_boxed
from lightning_grpo.rewards.final_answer import MARK


def marks_answer(completion: str) -> float:
    """1.0 if the completion marks its answer with exactly one `####` in its last line."""
    lines = completion.rstrip().splitlines() or [""]
    return float(completion.count(MARK) == 1 and MARK in lines[-1])


def boxes_answer(completion: str) -> float:
    r"""1.0 if the completion's last `\boxed{}` holds something, as `math` reads it."""
    return float(bool((last_boxed(completion) or "").strip("{} \n\t")))


def has_tags(tags: Sequence[str] = ("think", "answer")) -> Callable[..., float]:
    """A reward: 1.0 if the completion is `<tag>...</tag>` for each tag in order and nothing else.

    The first tag may have been opened by the chat template, at the end of the prompt.

    Args:
        tags: Names, in the order in which they must come.
    """

    def tags_in_order(completion: str, prompt: str | None = None) -> float:
        rest = completion.strip()
        first = f"<{tags[0]}>" if tags else ""
        opened = prompt.rstrip().endswith(first) if prompt is not None else first not in rest
        if opened:
            rest = first + rest
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            content, found, after = rest.removeprefix(opening).partition(closing)
            if not rest.startswith(opening) or not found or opening in content:
                return 0.0
            rest = after.lstrip()
        return float(not rest)

    return tags_in_order
