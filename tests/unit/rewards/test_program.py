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
    assert reward(leaves, [{"input": "", "output": "4"}]) == 0.0
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
        ('```python title="a.py"\na\n```', "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ("```Python3 copy\na\n```", "a\n"),
        ("```pythonic\na\n```", None),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```\n2. Done", "if a:\n    b\n"),
        ("- ```python\n  if a:\n      b\n  ```", "if a:\n    b\n"),
        ("> ```python\n> a\n> ```", "a\n"),
        ("```python\n  if a:\n    b\n```", "if a:\n  b\n"),
        ("Answer: ```python\na\n```", "a\n"),
        ("```python\na```", "a"),
        ("```python\na = '```'\n```\nso", "a = '```'\n"),
        ("```python\r\na\r\n```", "a\r\n"),
        ("```bash\nls\n```\n```\na\n```\n", "a\n"),
    ],
)
def test_the_last_whole_block_in_python_is_the_program(completion, program):
    assert last_program(completion) == program


def test_a_dataset_without_tests_is_told():
    with pytest.raises(ValueError, match="tests are empty"):
        code(DOUBLE, "")
    with pytest.raises(ValueError, match="must have `input` and `output`"):
        code(DOUBLE, [{"input": "1"}])


def test_leaving_after_the_right_output_passes():
    leaves = "```python\nimport sys\nprint(4)\nsys.exit({})\n```"
    cases = [{"input": "", "output": "4"}]
    assert code(leaves.format(0), cases) == code(leaves.format(""), cases) == 1.0
    assert code(leaves.format(1), cases) == code(leaves.format("'no'"), cases) == 0.0


def test_line_ends_of_another_system_are_line_ends():
    assert code("```\nprint(1)\nprint(2)\n```", [{"input": "", "output": "1\r\n2\r\n"}]) == 1.0


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["```python\n", "~~~\n", "`", "a ```\nb\n", "> ", "- ```\n"])
def test_a_megabyte_of_fences_is_read_at_once(text):
    last_program(text * (2**20 // len(text)))
