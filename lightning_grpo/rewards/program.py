"""Programs in completions, run under limits: against tests, or inputs with expected outputs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_grpo.rewards.sandbox import CodeLimits, CodeResult, run_python

_FENCE = "```"
_LANGUAGES = ("", "python", "py", "python3")
_MAX_CHARACTERS = 100_000
_SPACE_AT_END = re.compile(r"[ \t]+$", re.MULTILINE)
_DEFAULT_LIMITS = CodeLimits()


class CodeReward:
    """1.0 if the completion's program passes all tests, else 0.0.

    The program is the last fenced block in Python. What a test may be:

    - a text: Python statements that run after the program, in its namespace, and raise where it is
      wrong (a program that leaves early passes nothing; one that digs into the interpreter for the
      test's own state is not kept from it);
    - a list (or its JSON) of `{"input": ..., "output": ...}`: the program runs once for each, with
      the input on standard input, and must print the output; spaces at line ends don't count.

    Args:
        limits: Of each run. All runs of one completion share the reward's own time limit, so the
            tests of a completion end at the first that fails.

    Attributes:
        endings: How programs ended, in this process; the reward processes each have their own.
    """

    def __init__(self, limits: CodeLimits = _DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.endings: Counter[str] = Counter()

    def __call__(self, completion: str, tests: str | Sequence[Mapping[str, Any]]) -> float:
        """Run the completion's program.

        Args:
            completion: What the model wrote.
            tests: The dataset's tests.

        Raises:
            ValueError: The dataset has no tests for it.
        """
        cases = _cases(tests)
        program = last_program(completion)
        if program is None:
            self.endings["no_program"] += 1
            return 0.0
        if isinstance(cases, str):
            return float(self._run(program, tests=cases).ending == "done")
        return float(all(self._passes(program, case) for case in cases))

    def _passes(self, program: str, case: Mapping[str, Any]) -> bool:
        result = self._run(program, stdin=str(case["input"]))
        return result.ending == "done" and _plain(result.stdout) == _plain(str(case["output"]))

    def _run(self, program: str, tests: str = "", stdin: str = "") -> CodeResult:
        result = run_python(program, tests, stdin, self.limits)
        self.endings[result.ending] += 1
        return result


def code(completion: str, tests: str | list[dict[str, Any]]) -> float:
    """`CodeReward` with its default limits: 5 s, 512 MB, 1 MB of output, no network.

    Args:
        completion: What the model wrote.
        tests: Statements, or inputs and outputs.
    """
    return CodeReward()(completion, tests)


def last_program(completion: str) -> str | None:
    """The last fenced block that says Python, or says nothing; None if there is none."""
    parts = completion.split(_FENCE)
    # Odd parts stand between fences; the last one only if its fence ends.
    blocks = parts[1 : len(parts) - 1 : 2]
    for block in reversed(blocks):
        language, newline, body = block.partition("\n")
        if newline and language.strip().lower() in _LANGUAGES:
            return body if len(body) <= _MAX_CHARACTERS else None
    return None


def _cases(tests: str | Sequence[Mapping[str, Any]]) -> str | Sequence[Mapping[str, Any]]:
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        try:
            tests = json.loads(tests)
        except ValueError:
            return tests
    if not tests:
        raise ValueError("the dataset's tests are empty: every program would pass.")
    if not isinstance(tests, str) and not all({"input", "output"} <= set(case) for case in tests):
        raise ValueError("each test of a list must have `input` and `output`.")
    return tests


def _plain(text: str) -> str:
    return _SPACE_AT_END.sub("", text).strip("\n")
