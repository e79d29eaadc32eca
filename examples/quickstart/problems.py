"""Small word problems in GSM8K's format, and the mixed demonstrations that the base model saw.

Every problem has one or two steps over small numbers. Its answer is written as GSM8K writes it: one
line a step with the calculator mark (`9 * 5 = <<9*5=45>>45`), then `#### 45`. The wording decides
which problems are held out, so no test question is ever seen in training, whatever the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = tuple(
    "Anna Ben Carla David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul".split()
)
ITEMS = tuple(
    "apples books coins cards eggs flowers marbles pencils shells stamps stickers toys".split()
)
CONTAINERS = tuple("bags baskets boxes jars packs trays".split())
HELD_OUT_PARTS = 16
"""One part in this many of the wordings is held out."""

HASTY_SHARE = 0.65
"""Share of the mixed demonstrations that show one of the three bad habits."""
GUESS_SHARE, WRONG_STEP_SHARE = 0.6, 0.3
"""Of the bad habits: an answer without working, one wrong operation; the rest lacks the mark."""

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


@dataclass(frozen=True)
class Step:
    """One line of working: `left operation right`."""

    left: int
    operation: str
    right: int

    @property
    def result(self) -> int:
        """What the line comes to."""
        return OPERATIONS[self.operation](self.left, self.right)

    def __str__(self) -> str:
        """The line as GSM8K writes it, calculator mark included."""
        compact = f"{self.left}{self.operation}{self.right}={self.result}"
        return f"{self.left} {self.operation} {self.right} = <<{compact}>>{self.result}"


@dataclass(frozen=True)
class Problem:
    """A question and the steps that solve it; the last step's result is the answer."""

    question: str
    steps: tuple[Step, ...]

    @property
    def held_out(self) -> bool:
        """Whether the wording belongs to the test split."""
        return zlib.crc32(self.question.encode()) % HELD_OUT_PARTS == 0

    @property
    def answer(self) -> str:
        """The careful solution: every step, then the marked result."""
        return write_out(self.steps)


def write_out(steps: tuple[Step, ...]) -> str:
    """The steps line by line and `#### result` below them."""
    return "\n".join([*map(str, steps), f"#### {steps[-1].result}"])


def problems(seed: int, *, held_out: bool) -> Iterator[Problem]:
    """An endless stream of problems of one split; the same seed gives the same stream."""
    rng = random.Random(f"problems-{seed}")
    while True:
        problem = rng.choice(TEMPLATES)(rng)
        if problem.held_out == held_out:
            yield problem


def mixed_demonstration(problem: Problem, rng: random.Random) -> str:
    """A solution of a model that knows how, but often does not bother.

    About a third is careful. The rest guesses without working, takes a wrong operation in one step
    (where that leaves no negative number), or never marks its answer: what reinforcement learning
    then has to choose against.
    """
    if rng.random() >= HASTY_SHARE:
        return problem.answer
    habit = rng.random()
    if habit < GUESS_SHARE:
        return f"#### {max(0, problem.steps[-1].result + rng.randint(-6, 6))}"
    if habit < GUESS_SHARE + WRONG_STEP_SHARE:
        return write_out(_with_a_wrong_step(problem.steps, rng))
    return "\n".join(map(str, problem.steps))


def _with_a_wrong_step(steps: tuple[Step, ...], rng: random.Random) -> tuple[Step, ...]:
    """The steps with one operation mistaken and what follows computed from its result."""
    wrong_at = rng.randrange(len(steps))
    out: list[Step] = []
    for index, step in enumerate(steps):
        left = step.left
        if out and step.left == steps[index - 1].result:
            left = out[-1].result
        operation = step.operation
        if index == wrong_at:
            operation = "+" if operation == "-" else "-"
        if operation == "-" and left < step.right:
            operation = "+"
        out.append(Step(left, operation, step.right))
    return tuple(out)


def _two_names(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(NAMES, 2)
    return first, second


def _gift(rng: random.Random) -> Problem:
    name, friend = _two_names(rng)
    item, a, b = rng.choice(ITEMS), rng.randint(2, 20), rng.randint(2, 20)
    return Problem(
        f"{name} has {a} {item}. {friend} gives {name} {b} more. "
        f"How many {item} does {name} have now?",
        (Step(a, "+", b),),
    )


def _loss(rng: random.Random) -> Problem:
    name, friend = _two_names(rng)
    item, a = rng.choice(ITEMS), rng.randint(4, 30)
    b = rng.randint(2, min(a - 1, 20))
    return Problem(
        f"{name} has {a} {item} and gives {b} of them to {friend}. "
        f"How many {item} does {name} have left?",
        (Step(a, "-", b),),
    )


def _containers(rng: random.Random) -> Problem:
    name, item, container = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(CONTAINERS)
    a, b = rng.randint(2, 9), rng.randint(2, 5)
    return Problem(
        f"{name} has {a} {container} with {b} {item} in each. "
        f"How many {item} does {name} have in total?",
        (Step(a, "*", b),),
    )


def _containers_and_more(rng: random.Random) -> Problem:
    name, item, container = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(CONTAINERS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 20)
    return Problem(
        f"{name} has {a} {container} with {b} {item} in each and {c} more {item}. "
        f"How many {item} does {name} have in total?",
        (Step(a, "*", b), Step(a * b, "+", c)),
    )


def _containers_less_some(rng: random.Random) -> Problem:
    name, friend = _two_names(rng)
    item, container = rng.choice(ITEMS), rng.choice(CONTAINERS)
    a, b = rng.randint(2, 9), rng.randint(2, 5)
    c = rng.randint(2, min(a * b - 1, 20))
    return Problem(
        f"{name} buys {a} {container} with {b} {item} in each and gives {c} {item} to {friend}. "
        f"How many {item} does {name} have left?",
        (Step(a, "*", b), Step(a * b, "-", c)),
    )


def _two_gains(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    a, b, c = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 20)
    return Problem(
        f"{name} has {a} {item}, finds {b} and buys {c} more. "
        f"How many {item} does {name} have now?",
        (Step(a, "+", b), Step(a + b, "+", c)),
    )


def _gain_then_loss(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    c = rng.randint(2, min(a + b - 1, 20))
    return Problem(
        f"{name} has {a} {item}, finds {b} more and then loses {c}. "
        f"How many {item} does {name} have left?",
        (Step(a, "+", b), Step(a + b, "-", c)),
    )


def _times_as_many(rng: random.Random) -> Problem:
    name, friend = _two_names(rng)
    item, a, b = rng.choice(ITEMS), rng.randint(2, 9), rng.randint(2, 5)
    return Problem(
        f"{name} has {a} {item}. {friend} has {b} times as many. "
        f"How many {item} do they have together?",
        (Step(a, "*", b), Step(a * b, "+", a)),
    )


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    _gift,
    _loss,
    _containers,
    _containers_and_more,
    _containers_less_some,
    _two_gains,
    _gain_then_loss,
    _times_as_many,
)
