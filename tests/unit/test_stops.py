"""Which of several signals counts."""

from __future__ import annotations

import itertools

import pytest

from lightning_grpo.distributed.channel import most_urgent, signal_of, urgency


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["SIGUSR1", "SIGTERM", "", "SIGINT"]))
)
def test_a_request_to_run_again_outweighs_requests_to_end_in_any_order(order):
    assert most_urgent(order) == "SIGUSR1"


def test_no_signal_is_no_request():
    assert most_urgent([]) == most_urgent(["", ""]) == signal_of(urgency("")) == ""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGRTMAX"])
def test_a_number_that_travels_names_its_signal_again(name):
    assert signal_of(urgency(name)) == name
