import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_grpo.servers import supervisor
from lightning_grpo.serving.health import process_alive

NESTED = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("grandchild", child.pid, flush=True)
time.sleep(300)
"""


def start(log: Path, *command: str, **options) -> tuple[subprocess.Popen, int]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
            **options,
        )
    return process, int(process.stdout.readline().split()[1])


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid):
    return not process_alive(pid)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def finish(process):
    process.stdin.close()
    process.stdout.close()
    return process.wait(20)


def test_the_command_ends_when_standard_input_closes(log):
    process, pid = start(log, "sleep", "300")
    assert not gone(pid)
    finish(process)
    assert gone(pid)


def test_what_the_command_started_in_its_own_session_ends_too(log):
    process, pid = start(log, sys.executable, "-c", NESTED)
    until(lambda: b"\n" in log.read_bytes())
    grandchild = int(log.read_text().split()[1])
    assert os.getsid(grandchild) != os.getsid(pid)
    finish(process)
    assert gone(pid)
    assert gone(grandchild)


def test_sigterm_ends_all_of_it(log):
    process, pid = start(log, "sleep", "300")
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert gone(pid)
    finish(process)


def test_the_command_outlives_no_supervisor_that_is_killed(log):
    process, pid = start(log, "sleep", "300")
    process.kill()
    process.wait(20)
    until(lambda: gone(pid))
    finish(process)


def test_a_command_that_ignores_sigterm_is_killed(log):
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(300)"
    process, pid = start(log, sys.executable, "-u", "-c", code)
    until(lambda: b"on" in log.read_bytes())
    assert finish(process) == 128 + signal.SIGKILL
    assert gone(pid)


def test_the_commands_status_and_output_come_through(log):
    process, _ = start(log, "sh", "-c", "echo to-out; echo to-err >&2; exit 7")
    assert process.wait(20) == 7
    assert log.read_text().split() == ["to-out", "to-err"]
    finish(process)


def test_a_ctrl_c_in_the_parents_terminal_does_not_reach_the_command(log):
    process, pid = start(log, "sleep", "300")
    assert os.getpgid(pid) != os.getpgid(process.pid) != os.getpgid(0)
    finish(process)


def test_the_command_ends_with_a_parent_that_is_killed(log, tmp_path):
    code = f"""
import subprocess, sys, time
p = subprocess.Popen([sys.executable, "-I", {supervisor.__file__!r}, "--", "sleep", "300"],
                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
print(p.stdout.readline().split()[1].decode(), flush=True)
time.sleep(300)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: gone(pid))
