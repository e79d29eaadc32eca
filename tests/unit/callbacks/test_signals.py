"""Signals set a flag; handlers are given back to whom they were taken from."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from lightning_grpo.callbacks.stop_flag import StopFlag

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    before = {name: signal.getsignal(signal.Signals[name]) for name in NAMES}
    made = StopFlag()
    yield made
    made.uninstall()
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_sets_the_flag_and_nothing_else(flag, name):
    flag.install(NAMES)
    os.kill(os.getpid(), signal.Signals[name])
    assert soon(lambda: flag.requested == name)


@pytest.mark.parametrize("order", [("SIGUSR1", "SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGUSR1")])
def test_a_request_to_run_again_outweighs_the_end_that_comes_with_it(flag, order):
    flag.install(NAMES)
    for name in order:  # Slurm: a warning, then the end; the kernel may turn them around
        os.kill(os.getpid(), signal.Signals[name])
    assert soon(lambda: flag.requested == "SIGUSR1")


def test_handlers_come_back_and_the_flag_is_down_at_the_next_start(flag):
    before = signal.getsignal(signal.SIGTERM)
    flag.install(NAMES)
    flag.install(NAMES)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert soon(lambda: flag.requested != "")
    flag.uninstall()
    flag.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not flag.installed
    flag.install(NAMES)
    assert flag.requested == ""


def test_a_handler_that_somebody_else_put_in_place_is_left_alone(flag):
    flag.install(NAMES)

    def theirs(signum: int, frame: object) -> None:
        """Lightning's, given back before the callbacks' teardown."""

    signal.signal(signal.SIGTERM, theirs)
    flag.uninstall()
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_a_shutdown_may_keep_a_handler_that_exits(flag):
    usr1 = signal.getsignal(signal.SIGUSR1)
    flag.install(NAMES)
    flag.uninstall(exit_on_signal=True)
    assert signal.getsignal(signal.SIGTERM).__name__ == "_exit_now"
    assert signal.getsignal(signal.SIGUSR1) == usr1
