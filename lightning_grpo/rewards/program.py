"""Programs in completions, run under limits: against tests, or inputs with expected outputs."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_grpo.rewards.sandbox import CodeLimits, CodeResult, run_python

_FENCE = re.compile(r"`{3,}|~{3,}")
# What may stand before a fence, and is no part of the lines inside.
_INDENT = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?")
_LANGUAGE = re.compile(r"[\s{.]*([\w+#-]*)")
_LANGUAGES = ("", "python", "py", "python3")
_MAX_CHARACTERS = 100_000
_SPACE_AT_END = re.compile(r"[ \t]+$", re.MULTILINE)
_DEFAULT_LIMITS = CodeLimits()


class CodeReward:
    """1.0 if the completion's program passes all tests, else 0.0.

    The program is the last fenced block in Python. What a test may be:

    - a list (or its JSON) of `{"input": ..., "output": ...}`: the program runs once for each, with
      the input on standard input, and must print the output; spaces at line ends don't count;
    - a text: Python statements that raise where it is wrong. They run in an interpreter of their
      own, where names of the program stand for calls of it: it never sees them, and plain data
      comes back. Names of Python's own functions and modules are the real ones there.

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
        return result.ending in ("done", "exited") and _plain(result.stdout) == _plain(
            str(case["output"])
        )

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
    found = None
    for info, body in _blocks(completion):
        language = _LANGUAGE.match(info)
        if language is not None and language[1].lower() in _LANGUAGES:
            found = body
    return found if found is not None and len(found) <= _MAX_CHARACTERS else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """What each fence says, and what stands between it and the fence that ends it."""
    lines = text.splitlines(keepends=True)
    ends = [_ending_fence(line) for line in lines]
    longest = list(itertools.accumulate(reversed(ends), max, initial=""))[::-1]  # from there on
    fence, info, indent, body = "", "", 0, list[str]()
    for number, line in enumerate(lines):
        if not fence:
            found = _FENCE.search(line)
            if found is not None and "`" not in line[found.end() :] and line.endswith("\n"):
                fence, info, body = found[0], line[found.end() :], []
                before = _INDENT.match(line)
                indent = found.start() if before and before.end() == found.start() else 0
            continue
        last = "" if ends[number].startswith(fence) else None
        if last is None and line.rstrip().endswith(fence) and not longest[number + 1] >= fence:
            last = line.rstrip().rstrip(fence[0])  # the only end there is
        if last is None:
            body.append(_without(line, indent))
            continue
        yield info, textwrap.dedent("".join([*body, last]))
        fence = ""


def _ending_fence(line: str) -> str:
    stripped = line.lstrip(" \t>")
    found = _FENCE.match(stripped)
    return found[0] if found and not re.match(r"[\w`~]", stripped[found.end() :]) else ""


def _without(line: str, indent: int) -> str:
    kept = line[:indent].lstrip(" \t>")
    return kept + line[indent:]


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
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return _SPACE_AT_END.sub("", lines).strip("\n")
