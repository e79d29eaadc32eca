"""One node's process as an actor sees to it, without Ray."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from lightning_grpo.launch.ray import Node


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.end()


def until_ended(node: Node, offset: int = 0) -> tuple[int, bytes]:
    deadline, output = time.monotonic() + 30, b""
    while time.monotonic() < deadline:
        status, more = node.look(offset + len(output))
        output += more
        if status is not None and not more:
            return status, output
        time.sleep(0.02)
    raise AssertionError(f"still running: {output!r}")


def test_output_and_status_are_fetched_piece_by_piece(node, tmp_path):
    program = "import os, sys; print(os.getcwd(), os.environ['WORD'], flush=True); sys.exit(3)"
    node.start([sys.executable, "-c", program], {"WORD": "hello"}, str(tmp_path))
    assert until_ended(node, offset=1) == (3, f"{tmp_path} hello\n".encode()[1:])


def test_a_signal_reaches_the_program_and_an_ended_one_ignores_it(node, tmp_path):
    program = "import signal, time; print('up', flush=True); time.sleep(99)"
    node.start([sys.executable, "-c", program], {}, str(tmp_path))
    while not node.look(0)[1]:
        time.sleep(0.02)
    node.signal(signal.SIGTERM)
    assert until_ended(node) == (128 + signal.SIGTERM, b"up\n")
    node.signal(signal.SIGTERM)


def test_the_end_of_a_node_ends_what_its_program_started(node, tmp_path):
    program = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '99']); "
        "print(p.pid, flush=True); time.sleep(99)"
    )
    node.start([sys.executable, "-c", program], {}, str(tmp_path))
    while not (output := node.look(0)[1]):
        time.sleep(0.02)
    node.end()
    assert not psutil.pid_exists(int(output))


def test_a_free_port_can_be_listened_on(node):
    assert 1024 <= node.free_port() < 65536
