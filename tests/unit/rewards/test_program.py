"""Programs in completions, against tests."""

from __future__ import annotations

import json

import pytest

from lightning_grpo.rewards import code
from lightning_grpo.rewards.program import CodeReward, last_program

DOUBLE = "Here:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."
ECHO = "```\nprint(int(input()) * 2)\n```"
CASES = [{"input": "1", "output": "2\n"}, {"input": "4\n", "output": "8  "}]


def test_statements_run_after_the_program():
    assert code(DOUBLE, "assert f(2) == 4") == 1.0
    assert code(DOUBLE, "assert f(2) == 5") == 0.0


def test_inputs_must_give_their_outputs():
    assert code(ECHO, CASES) == 1.0
    assert code(ECHO, json.dumps(CASES)) == 1.0
    assert code(ECHO, [*CASES, {"input": "1", "output": "3"}]) == 0.0
    assert code(ECHO, [{"input": "x", "output": ""}]) == 0.0


def test_a_program_that_leaves_early_passes_nothing():
    leaves = "```python\nimport sys\nsys.exit(0)\n```"
    reward = CodeReward()
    assert reward(leaves, "assert False") == 0.0
    assert reward(leaves, [{"input": "", "output": ""}]) == 0.0
    assert reward("no program", "assert True") == 0.0
    assert reward.endings == {"exited": 2, "no_program": 1}


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (DOUBLE, "def f(x):\n    return 2 * x\n"),
        ("```python\na\n```\n```py\nb\n```\n```bash\nls\n```", "b\n"),
        ("```python\nnever ends", None),
        ("```python\na\n```\nand ```python\nhalf", "a\n"),
        ("no program", None),
        ("```", None),
        ("```python\n" + "x" * 200_000 + "\n```", None),
        ("```" * 100_000, None),
    ],
)
def test_the_last_whole_block_in_python_is_the_program(completion, program):
    assert last_program(completion) == program


def test_a_dataset_without_tests_is_told():
    with pytest.raises(ValueError, match="tests are empty"):
        code(DOUBLE, "")
    with pytest.raises(ValueError, match="must have `input` and `output`"):
        code(DOUBLE, [{"input": "1"}])
