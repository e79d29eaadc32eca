"""A run that fails without a correction, and learns with one."""

from __future__ import annotations

import pytest

from benchmarks.off_policy import train
from lightning_grpo.algorithm.corrections import IcePop, SequenceTIS, TokenTIS

START = 0.5


def test_servers_that_sample_a_good_token_too_rarely_make_the_policy_unlearn_it():
    assert train(None, seed=0, steps=100) < START - 0.01


@pytest.mark.parametrize("correction", [TokenTIS(), SequenceTIS(), IcePop(0.5, 10.0)], ids=str)
def test_a_correction_saves_the_run(correction):
    assert train(correction, seed=0, steps=100) > START + 0.08


def test_servers_that_agree_need_none():
    assert train(None, seed=0, steps=100, bias=0.0) > START + 0.15
