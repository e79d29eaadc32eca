"""SIGTERM before training: an exception once, the default action afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import Future

import pytest

from lightning_grpo.callbacks.early_stop import EarlyStop, came_early
from lightning_grpo.callbacks.signals import SignalHandling, StopFlag
from lightning_grpo.distributed import RankChannel
from lightning_grpo.errors import StopRun


@pytest.fixture(autouse=True)
def handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_signal_raises_once_with_its_exit_status():
    early = EarlyStop()
    early.install()
    with pytest.raises(StopRun, match="SIGTERM outside of training") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    early.uninstall()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_whose_exception_was_lost_in_a_library_ends_the_next_wait_and_training():
    early, handling = EarlyStop(), SignalHandling()
    channel = RankChannel.single(poll_s=0.01)
    handling.connect(channel)
    early.install()
    try:
        assert handling.poll() == ""
        with contextlib.suppress(Exception):  # as around an optional import
            os.kill(os.getpid(), signal.SIGTERM)
        assert handling.poll() == "SIGTERM"
        with pytest.raises(StopRun):
            channel.wait(Future(), what="the start of the servers")
        handling.flag.install(("SIGTERM", "SIGUSR1"))
        assert handling.poll() == "SIGTERM"
    finally:
        handling.flag.uninstall()
        early.uninstall()
    assert handling.poll() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_of_one_run_is_no_news_to_the_next_one_in_the_same_program(number):
    early, flag = EarlyStop(), StopFlag()
    early.install()
    with contextlib.suppress(StopRun):
        os.kill(os.getpid(), number)
    early.uninstall()
    early.install()
    try:
        assert not came_early(number, signal.getsignal(number))
        flag.install(("SIGTERM", "SIGUSR1"))
        assert flag.requested == ""
    finally:
        flag.uninstall()
        early.uninstall()


def test_a_warning_of_the_time_limit_waits_for_training():
    early, flag = EarlyStop(), StopFlag()
    early.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        flag.install(("SIGTERM", "SIGUSR1"))
        assert flag.requested == "SIGUSR1"
    finally:
        flag.uninstall()
        early.uninstall()


def test_what_was_given_back_and_a_handler_of_others_are_left_alone():
    early = EarlyStop()
    early.install()
    early.uninstall()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    early.install()
    early.uninstall()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_handler_that_was_brought_back_gives_way_to_the_next_run_s():
    first, second = EarlyStop(), EarlyStop()
    first.install()
    kept = signal.getsignal(signal.SIGTERM)
    first.uninstall()
    signal.signal(signal.SIGTERM, kept)
    second.install()
    with pytest.raises(StopRun):
        os.kill(os.getpid(), signal.SIGTERM)
    second.uninstall()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_handler_that_somebody_brings_back_later_acts_as_the_default(number):
    program = (
        "import os, signal; from lightning_grpo.callbacks.early_stop import EarlyStop as E;"
        f"n = {int(number)}; e = E(); e.install(); kept = signal.getsignal(n); e.uninstall();"
        "signal.signal(n, kept); os.kill(os.getpid(), n); print('still here')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
