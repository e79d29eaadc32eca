"""Programs that need a GPU or an hour run seldom: what they use of the package must be there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = {"matplotlib", "trl"}  # of the extra `bench`
PROGRAMS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").rglob("*.py")
    if file.stem != "__init__"
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_benchmark_finds_all_that_it_imports(program):
    try:
        importlib.import_module(program)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
