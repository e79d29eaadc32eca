"""The leak checks of `tests/conftest.py` do fail a test that leaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

TESTS = """
import os, subprocess, sys, threading, time

def test_environment():
    os.environ["LEAKED"] = "1"

def test_thread():
    threading.Thread(target=time.sleep, args=(2,), name="leaked").start()

def test_process():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

def test_tidy():
    os.environ["PASSING"] = "1"
    del os.environ["PASSING"]
    thread = threading.Thread(target=print)
    thread.start()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
"""
COMPLAINTS = {
    "test_environment": "environment variables changed and not put back: ['LEAKED']",
    "test_thread": "threads still running: ['leaked']",
    "test_process": "child processes still running",
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> str:
    """What pytest says of them."""
    folder = tmp_path_factory.mktemp("leaks")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(TESTS)
    shortened = CONFTEST.read_text().replace("GRACE_S = 5.0", "GRACE_S = 0.3")
    (folder / "conftest.py").write_text(shortened)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "test_it.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("test", COMPLAINTS)
def test_a_leak_fails_the_test_that_made_it(outcome, test):
    assert f"ERROR test_it.py::{test} " in outcome
    assert COMPLAINTS[test] in outcome


def test_a_test_that_cleans_up_passes(outcome):
    assert "PASSED test_it.py::test_tidy" in outcome
    assert "ERROR test_it.py::test_tidy" not in outcome
