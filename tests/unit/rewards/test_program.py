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
    assert reward.endings == {"exited": 1, "done": 1, "no_program": 1}


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


def in_python(program):
    return f"```python\n{program}\n```"


ALWAYS = """
class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
    def __contains__(self, item): return True
    def __sub__(self, other): return 0.0
    def __rsub__(self, other): return 0.0
    def __abs__(self): return 0.0
    def __hash__(self): return 0
    def __enter__(self): return self
    def __exit__(self, *error): return True
    def __repr__(self): return "4"
class Four(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
"""
CHEATS = {
    "says yes": (ALWAYS + "def f(x): return Yes()", "assert f(3) == 6"),
    "says yes within": (ALWAYS + "def f(x): return [Yes()]", "assert f(3) == [6]"),
    "says yes to twins": (ALWAYS + "def f(x): return Yes()", "assert f(3) == f(4)"),
    "says yes as a number": (ALWAYS + "def f(x): return Four(4)", "assert f(3) == 6"),
    "is true": (ALWAYS + "def f(x): return Yes()", "assert f(3)"),
    "is more": (ALWAYS + "def f(x): return Yes()", "assert f(3) > 5"),
    "has all": (ALWAYS + "def f(x): return Yes()", "assert 6 in f(3)"),
    "is close": (ALWAYS + "def f(x): return Yes()", "assert abs(f(3) - 6) < 1e-6"),
    "swallows": (ALWAYS + "def f(x): return Yes()", "with f(3) as y:\n    assert y == 6"),
    "stands for the driver": (
        "import sys\nsys.modules['__main__']._run = lambda *a: None\nf = lambda x: 0",
        "assert f(3) == 6",
    ),
    "stands for a judge": (
        "def abs(x): return 0\nclass math:\n    isclose = lambda *a: True\nf = lambda x: 0",
        "import math\nassert abs(f(3) - 6) < 1 or math.isclose(f(3), 6)",
    ),
    "stands for a judge without an import": (
        "class math:\n    isclose = lambda *a: True\nf = lambda x: 0",
        "def check(g): assert math.isclose(g(3), 6)\ncheck(f)",
    ),
    "stands for the built-in ones": (
        "globals()['__builtins__'] = None\ndef f(x): return 0",
        "assert f(3) == 6",
    ),
    "ends a loop": (
        "def f(x): raise StopIteration",
        "assert all(map(f, [1, 2]))",
    ),
    "empties the question": (
        "def f(x):\n    x.clear()\n    return []",
        "x = [3, 1]\nassert f(x) == sorted(x)",
    ),
    "leaves": ("def f(x):\n    import os\n    os._exit(0)", "assert f(3) == 6"),
    "leaves where an error is expected": (
        "def f(x):\n    import os\n    os._exit(0)",
        "try:\n    f(3)\nexcept Exception:\n    pass",
    ),
    "raises what ends the tests": ("def f(x): raise SystemExit(0)", "assert f(3) == 6"),
    "looks for the tests": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'secret' in frame.f_globals: return frame.f_globals['secret']\n"
        "        frame = frame.f_back",
        "secret = 6\nassert f(3) == secret",
    ),
    "calls out of what it was passed": (
        "def f(check): return check.__globals__['secret']",
        "secret = 6\ndef g(): pass\nassert f(g) == secret",
    ),
    "writes on every descriptor": (
        "import os\nfor d in range(3, 20):\n    try: os.write(d, b'\\xff' * 8)\n"
        "    except OSError: pass\nf = lambda x: 0",
        "assert f(3) == 6",
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_reaches_for_its_verdict_fails(name):
    program, tests = CHEATS[name]
    assert code(in_python(program), tests) == 0.0


HONEST = {
    "plain data": (
        "def f(x): return {'a': (1, 2.5, None, True), 3: {4, 5}, 'b': [b'x', 2j, 10**30]}",
        "assert f(1) == {'a': (1, 2.5, None, True), 3: {4, 5}, 'b': [b'x', 2j, 10**30]}",
    ),
    "kinds are kept": (
        "from collections import deque\ndef f(x): return deque([x])",
        "from collections import deque\nassert f(1) == deque([1]) and isinstance(f(1), deque)",
    ),
    "a method": (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def __len__(self): return 1",
        "s = Stack()\ns.push(3)\nassert s.items == [3] and len(s) == 1",
    ),
    "in place": ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    "an error": (
        "class Bad(ValueError): pass\ndef f(x): raise Bad('no')",
        "try:\n    f(1)\nexcept ValueError as error:\n    assert str(error) == 'no'\n"
        "else:\n    assert False",
    ),
    "a function as an argument": (
        "def f(g, xs): return [g(x) for x in xs]",
        "assert f(lambda x: x + 1, [1, 2]) == [2, 3]",
    ),
    "a generator": (
        "def f(n):\n    while True:\n        yield n\n        n += 1",
        "import itertools\nassert list(itertools.islice(f(3), 3)) == [3, 4, 5]",
    ),
    "what prints alike": (
        "from fractions import Fraction\ndef f(x): return Fraction(1, x)",
        "from fractions import Fraction\nassert f(2) == Fraction(1, 2) and str(f(2)) == '1/2'",
    ),
    "a check of the tests' own": (
        "def g(x): return x / 3",
        "def check(candidate):\n    assert math.isclose(candidate(1), 0.333333, abs_tol=1e-5)\n"
        "check(g)",
    ),
    "a long number": ("def f(n): return 10**n", "assert f(5000) == 10**5000"),
    "recursion and keywords": (
        "def f(n, *, k=1): return k if n == 0 else n * f(n - 1, k=k)",
        "assert f(5, k=2) == 240 and f(500) % 7 == 0",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes_as_if_its_tests_ran_beside_it(name):
    program, tests = HONEST[name]
    assert code(in_python(program), tests) == 1.0
