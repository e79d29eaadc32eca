"""A `Generator` that answers after a chosen time, with the version that its servers have then."""

from __future__ import annotations

import random
from collections import Counter

import anyio

from lightning_grpo.types import Completion


class FakeGenerator:
    """Answers after `duration(input_ids, n)` (virtual) seconds, n being the request's number.

    Attributes:
        version: What the servers hold; tests set it just before they call `advance`.
        fail: Called with a request's number; an exception that it returns is raised.
        requests: Every request in order, as a dictionary.
    """

    def __init__(self, duration=lambda input_ids, number: 1.0, fail=lambda number: None):
        self.version = 0
        self.duration = duration
        self.fail = fail
        self.requests = []
        self.running = 0
        self.most_running = 0
        self.cancelled = 0

    async def generate(self, input_ids, sampling, *, group_key=None, priority=False, seed=None):
        number = len(self.requests)
        self.requests.append(
            {
                "input_ids": tuple(input_ids),
                "sampling": sampling,
                "group_key": group_key,
                "priority": priority,
                "seed": seed,
            }
        )
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        first = self.version
        try:
            await anyio.sleep(self.duration(tuple(input_ids), number))
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        error = self.fail(number)
        if error is not None:
            raise error
        noise = random.Random(f"{seed}:{tuple(input_ids)}")
        ids = tuple(noise.randrange(100, 200) for _ in range(3))
        return Completion(
            token_ids=ids,
            logprobs=tuple(-noise.random() for _ in ids),
            versions=(first, first, self.version),  # the last token came after any update
            text=" ".join(map(str, ids)),
            finish_reason="stop",
        )

    def seeds_used_twice(self):
        return [
            seed for seed, count in Counter(r["seed"] for r in self.requests).items() if count > 1
        ]


class InlineScorer:
    """A `Scorer` that calls the reward at once."""

    async def score(self, reward, arguments):
        return reward(**arguments)
