"""Hostile answers in real reward processes: the next healthy one is scored as if nothing was."""

from __future__ import annotations

import anyio
import pytest

from lightning_grpo.errors import RewardError
from lightning_grpo.rewards import code, math
from lightning_grpo.rollout.scoring import RewardScorer

pytest.importorskip("math_verify", reason="needs the extra [math]")

HEALTHY = {"completion": "\\boxed{0.5}", "answer": "\\frac{1}{2}"}
HOSTILE = (
    "\\boxed{" + "9" * 2**20 + "}",
    "\\boxed{" * 2**18,
    "\\boxed{" + "(" * 100 + "5" + ")" * 100 + "}",
    "\\boxed{9^{9^{9^{9^9}}}}",
    "\\boxed{(\\sin x + \\cos x)^{97} (\\tan x + \\cot x)^{89} - e^{i x^{31}}}",
    "\\boxed{\\int_0^1 e^{x^x} \\sin(\\cos(\\tan(x^x))) dx}",
    "\ud800\x00\\boxed{\x00}",
)
PROGRAMS = (
    "while True: pass",
    "import os\nwhile True: os.fork()",
    "while True: print('x' * 10000)",
    "x = 'x' * 10**10",
    "import os; os.kill(os.getppid(), 9)",
    "import ctypes; ctypes.string_at(0)",
)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_hostile_mathematics_is_wrong_and_blocks_nobody():
    async def play():
        async with RewardScorer([math], processes=1, timeout_s=30) as scorer:
            values = []
            for text in HOSTILE:
                values.append(await scorer.score(math, {**HEALTHY, "completion": text}))
                assert await scorer.score(math, HEALTHY) == 1.0
            return values, scorer.counts

    values, counts = anyio.run(play)
    assert values == [0.0] * len(HOSTILE)
    assert (counts.timed_out, counts.crashed, counts.failed) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_hostile_programs_are_wrong_and_block_nobody():
    async def play():
        async with RewardScorer([code], processes=1, timeout_s=30) as scorer:
            for program in PROGRAMS:
                completion = f"```python\n{program}\n```"
                arguments = {"completion": completion, "tests": "assert True"}
                assert await scorer.score(code, arguments) == 0.0
            healthy = {"completion": "```python\nx = 1\n```", "tests": "assert x == 1"}
            assert await scorer.score(code, healthy) == 1.0
            return scorer.counts

    counts = anyio.run(play)
    assert (counts.timed_out, counts.crashed, counts.failed) == (0, 0, 0)


@pytest.mark.slow
def test_a_program_ends_with_the_reward_process_that_was_killed_for_its_time():
    async def play():
        async with RewardScorer([code], processes=1, timeout_s=2.5) as scorer:
            loop = {"completion": "```python\nwhile True: pass\n```", "tests": "assert True"}
            with pytest.raises(RewardError, match="took longer than"):
                await scorer.score(code, loop)
            return scorer.counts.timed_out

    assert anyio.run(play) == 1  # the leak checks around each test see to the rest
