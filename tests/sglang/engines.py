"""Which servers the conformance tests run on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_grpo.servers.sglang import SGLangServers
from tests.sglang.environment import DEFAULT_FOLDER, ready_python

FOLDER_VARIABLE = "SGLANG_TEST_ENVIRONMENT"
OVERLAY_VARIABLE = "SGLANG_TEST_OVERLAY"
"""A folder with the unpacked wheel of another SGLang, which goes before the installed one."""

MARKS = [pytest.mark.sglang, pytest.mark.timeout(400)]
REAL = pytest.param("sglang", marks=MARKS)
WITHOUT_PREFIXES = pytest.param("sglang-without-prefixes", marks=MARKS)
"""Its cache of prefixes keeps what a retracted request had computed, and uses it under the next
weights (0.5.19): `retract` is exact only without."""

RETRACTING = pytest.mark.parametrize(
    "shared_server", ["embedded", WITHOUT_PREFIXES], indirect=True, scope="session"
)


def real_servers(num_servers: int = 1, tp: int = 1, **flags: Any) -> SGLangServers:
    """SGLang on this CPU."""
    folder = Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER)).absolute()
    installed = ready_python(folder)
    if installed is None:
        pytest.fail(f"no SGLang in {folder}: run `make test-sglang`")
    python = installed.python
    overlay = os.environ.get(OVERLAY_VARIABLE)
    if overlay:
        script = folder / "bin" / f"python-{Path(overlay).name}"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={overlay} exec {python} "$@"\n')
        script.chmod(0o755)
        python = str(script)
    return SGLangServers(num_servers, tp, python=python, flags={"device": "cpu"} | flags)
