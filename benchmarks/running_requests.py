"""How many requests a server should decode at once, of a run that keeps some batches in flight.

A simulation: groups are admitted as weights advance and taken as they end; a step of decoding takes
`fixed` seconds and `each` more for every request in it. The defaults of those are what four servers
of SmolLM2-135M took on one H200 (47k tokens/s at 1,024 at once, 88k at 2,048). For each share of
completions that reach the length limit it prints seconds a step, and the longest over the median.

    python benchmarks/running_requests.py
    python benchmarks/running_requests.py --fixed 0.003 --each 1.76e-5
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import deque
from dataclasses import dataclass

WARM_UP = 8


@dataclass(frozen=True)
class Setup:
    """What is simulated.

    Attributes:
        fixed: Of a step of decoding, seconds.
        each: More for each request in it, seconds.
        train_s: Of an optimizer step.
        sync_s: Of a weight sync, in which servers stand still.
        groups: Of a batch.
        size: Completions of a group.
        staleness: Batches in flight, less one.
        limit: Tokens of the longest completion.
        steps: Optimizer steps.
    """

    fixed: float
    each: float
    train_s: float = 1.3
    sync_s: float = 0.7
    groups: int = 256
    size: int = 4
    staleness: int = 2
    limit: int = 1024
    steps: int = 40


def step_times(setup: Setup, at_once: int, at_limit: float, seed: int = 0) -> list[float]:
    """Seconds of each step but the first few.

    Args:
        setup: The run.
        at_once: Requests that are decoded side by side.
        at_limit: Share of completions that reach the limit; others have up to half as many tokens.
        seed: Of the lengths.
    """
    draw = random.Random(seed)

    def length() -> int:
        short = draw.randint(setup.limit // 20, setup.limit // 2)
        return setup.limit if draw.random() < at_limit else short

    waiting: deque[list[int]] = deque()
    running: list[list[int]] = []
    left: list[int] = []
    ready = version = 0
    now = last = 0.0
    trained_at: float | None = None
    times: list[float] = []
    while version < setup.steps:
        while len(left) < (version + 1 + setup.staleness) * setup.groups:
            waiting += [[length(), len(left)] for _ in range(setup.size)]
            left.append(setup.size)
        if trained_at is None and ready >= setup.groups:
            ready, trained_at = ready - setup.groups, now + setup.train_s
        if trained_at is not None and now >= trained_at:
            version, trained_at = version + 1, None
            times.append(now - last)
            last, now = now, now + setup.sync_s
            continue
        while waiting and len(running) < at_once:
            running.append(waiting.popleft())
        now += setup.fixed + setup.each * len(running)
        running, ended = decode(running, left)
        ready += ended
    return times[WARM_UP:]


def decode(running: list[list[int]], left: list[int]) -> tuple[list[list[int]], int]:
    """A token of each request.

    Args:
        running: Tokens to come, and the group, of each.
        left: Completions to come of each group; counted down.

    Returns:
        The requests that go on, and how many groups ended.
    """
    ended = 0
    for request in running:
        request[0] -= 1
        if request[0] == 0:
            left[request[1]] -= 1
            ended += left[request[1]] == 0
    return [request for request in running if request[0] > 0], ended


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fixed", type=float, default=0.0203)
    parser.add_argument("--each", type=float, default=1.42e-6)
    parser.add_argument("--staleness", type=int, default=2)
    args = parser.parse_args()
    setup = Setup(args.fixed, args.each, staleness=args.staleness)
    batch = setup.groups * setup.size
    choices = [share for share in (1.0, 1.25, 1.5, 2.0, 3.0) if share <= setup.staleness + 1]
    print("| at the limit | " + " | ".join(f"{share:g} batches" for share in choices) + " |")
    print("| --- " * (len(choices) + 1) + "|")
    for at_limit in (0.05, 0.35, 0.6):
        cells = []
        for share in choices:
            times = step_times(setup, int(share * batch), at_limit)
            uneven = max(times) / statistics.median(times)
            cells.append(f"{statistics.mean(times):.1f} s, {uneven:.1f}")
        print(f"| {at_limit:.0%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
