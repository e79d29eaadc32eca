"""The inside of `sandbox.run_python`: `python -I confined_python.py`, its orders on descriptor 0.

Standard library and one sibling file only; loaded by path, so that `-I` can keep the user's
environment out. Reads everything that it must not show before it runs the program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# A program may put others in the place of the built-in ones, and no test would run.
_compile, _exec = compile, exec


def main() -> None:
    """Confines this process, runs the program and then its tests, and says that they ended."""
    orders = json.loads(os.read(0, os.fstat(0).st_size))
    confinement = _load("confine", Path(__file__).with_name("confine.py"))
    confinement.die_with_parent(orders["parent"])
    stdin = os.open(orders["stdin"], os.O_RDONLY)
    os.dup2(stdin, 0)
    missing = confinement.confine(confinement.Confinement(**orders["limits"]))
    os.write(2, (json.dumps(missing) + "\n").encode())
    nonce, result = orders["nonce"], os.dup(1)
    source, tests = orders["source"], orders["tests"]
    orders.clear()
    sys.argv = ["program.py"]
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    _run(source, "program.py", names)
    if tests:
        _run(tests, "tests.py", names)
    sys.stdout.flush()
    os.write(result, nonce.encode())


def _run(source: str, name: str, names: dict[str, Any]) -> None:
    _exec(_compile(source, name, "exec"), names)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
