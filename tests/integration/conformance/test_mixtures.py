"""A mixture's experts reach any server one by one, and it computes with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_grpo.policy.load import without_bars
from lightning_grpo.servers.process import EmbeddedServers, OwnedServers
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer
from tests.fakes.tiny_model import make_tiny_model
from tests.sglang.engines import REAL, real_servers


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers, eight experts each."""
    with without_bars():
        folder = tmp_path_factory.mktemp("mixture")
        return make_tiny_model(folder, hidden_size=64, num_experts=8, tie_word_embeddings=False)


@pytest.fixture(params=["embedded", REAL])
def servers(request: pytest.FixtureRequest) -> Iterator[OwnedServers]:
    """One server, of its own: it loads another model than those of the other tests."""
    servers = EmbeddedServers() if request.param == "embedded" else real_servers()
    yield servers
    servers.stop()


def test_every_sync_of_a_mixture_is_proved(
    servers: OwnedServers, mixture: Path, tmp_path: Path
) -> None:
    answers = itertools.count()

    def alternating(completion: str) -> float:
        return float(next(answers) % 2)  # each group has something to learn

    recorder, data = Recorder(), make_data(servers, alternating)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    trainer.fit(make_module(mixture), data)
    assert max(recorder.of("mismatch/probe")) < 1e-4
    assert data.session.report.probe_diff < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-4
