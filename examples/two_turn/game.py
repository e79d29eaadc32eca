"""Guess a number in two turns: the first guess is given, what it says must be used.

| user | assistant |
| --- | --- |
| Guess my number. Start at 34. | #### 34 |
| Your guess is 7 too low. | 34 + 7 = <<34+7=41>>41, and below #### 41 |
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from lightning_grpo.rewards.answers import final_number, gsm8k

HELD_OUT_PARTS = 6


def question(start: int) -> str:
    """What is asked first."""
    return f"Guess my number. Start at {start}."


def feedback(completion: str, answer: str) -> str:
    """What is said to a wrong guess."""
    guess = final_number(completion)
    if guess is None:
        return "Write your guess after ####."
    off = int(answer) - int(guess)
    return f"Your guess is {abs(off)} too {'low' if off > 0 else 'high'}."


def reward(completion: str, answer: str) -> float:
    """1.0 for the number."""
    return gsm8k(completion, answer)


def games(rng: random.Random, *, held_out: bool) -> Iterator[tuple[int, int]]:
    """Endless (start, number) of one split."""
    while True:
        start, off = rng.randint(12, 40), rng.randint(2, 20)
        number = start + off if rng.random() < 0.5 or off > start - 3 else start - off
        if (zlib.crc32(f"{start} {number}".encode()) % HELD_OUT_PARTS == 0) == held_out:
            yield start, number
