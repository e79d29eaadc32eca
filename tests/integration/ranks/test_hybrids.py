"""A hybrid on real gloo ranks, sharded by block and in micro-batches: one loss, one gradient."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from lightning_grpo.certify.tiny import VOCAB, tiny_config, tiny_model
from lightning_grpo.policy.load import without_bars
from tests.fakes.ranks import run_ranks
from tests.fakes.recordings import write_recording
from tests.integration.ranks.test_invariance import BATCHES, Case, Seen, difference, replay_all

WHOLE, MANY = 10**6, 40
ROUNDING = 1e-4
"""In fp32, of gradients whose norm is 1: states sum over all tokens before."""


@pytest.fixture(params=["qwen3_next", "nemotron_h"])
def folder(request, tmp_path) -> Path:
    path = tmp_path
    with without_bars():
        tiny_model(tiny_config(CONFIG_MAPPING[request.param]())).save_pretrained(path / "model")
    write_recording(
        path / "recording-0", 0, batches=BATCHES, groups=4, vocab=VOCAB, temperature=1.0
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ranks_shards_and_cuts_change_nothing(folder):
    whole = Case(0, WHOLE, "float32")
    cases = [astuple(Case(0, MANY, "float32", sharded)) for sharded in (False, True)]
    ((expected,),) = run_ranks(replay_all, 1, [astuple(whole)], str(folder), 1, timeout_s=90)
    for results in run_ranks(replay_all, 2, cases, str(folder), 2, timeout_s=90):
        for found in results:
            worst, name = difference(Seen(**found), Seen(**expected))
            assert worst <= ROUNDING, f"{worst:.1e} in {name}"
    assert all(float(g.norm()) > 0.01 for g in Seen(**expected).gradients)
