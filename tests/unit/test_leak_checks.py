"""The leak checks of `tests/conftest.py` do fail a test that leaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

LEAKS = {
    "environment variables changed and not put back: ['LEAKED']": """
import os
def test_leak():
    os.environ["LEAKED"] = "1"
""",
    "threads still running: ['leaked']": """
import threading, time
def test_leak():
    threading.Thread(target=time.sleep, args=(2,), name="leaked").start()
""",
    "child processes still running": """
import subprocess, sys
def test_leak():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
""",
}

TIDY = """
import os, subprocess, sys, threading
def test_tidy():
    os.environ["PASSING"] = "1"
    del os.environ["PASSING"]
    thread = threading.Thread(target=print)
    thread.start()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
"""


def run_pytest(folder: Path, test: str) -> subprocess.CompletedProcess:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(test)
    shortened = CONFTEST.read_text().replace("GRACE_S = 5.0", "GRACE_S = 0.3")
    (folder / "conftest.py").write_text(shortened)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("complaint", LEAKS)
def test_a_leak_fails_the_test_that_made_it(tmp_path, complaint):
    done = run_pytest(tmp_path, LEAKS[complaint])
    assert done.returncode != 0
    assert complaint in done.stdout


def test_a_test_that_cleans_up_passes(tmp_path):
    done = run_pytest(tmp_path, TIDY)
    assert done.returncode == 0, done.stdout
