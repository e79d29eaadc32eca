"""A mixture's experts reach any server one by one, and it computes with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.policy.load import without_bars
from lightning_grpo.servers.process import EmbeddedServers, OwnedServers
from lightning_grpo.serving.wire import checked_routes
from lightning_grpo.types import RouterShape, Sampling
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer
from tests.fakes.mixtures import own_routes
from tests.fakes.tiny_model import make_tiny_model
from tests.sglang.engines import REAL, real_servers
from tests.sglang.server import Server


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


def test_the_experts_of_each_token_are_told_and_are_those_of_a_full_pass(
    servers: OwnedServers, mixture: Path, tmp_path: Path
) -> None:
    servers.tells_routes = True
    server = Server("mixture", servers, mixture, tmp_path)
    assert server.get("/server_info")["enable_return_routed_experts"] is True
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12], [5, 6, 7, 8, 9]]
    sampling = {"max_new_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    replies = server.generate(prompts, sampling=sampling, return_routed_experts=True)
    again = server.generate(prompts[0], sampling=sampling, return_routed_experts=True)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    for prompt, reply in zip([*prompts, prompts[0]], [*replies, again], strict=True):
        ids = torch.tensor([*prompt, *reply["output_ids"]])
        expected = own_routes(model, ids, torch.tensor([0, len(ids)]), num_layers=2)[:-1]
        routes = checked_routes(
            reply["meta_info"]["routed_experts"], RouterShape(2, 2, 8), len(ids), "http://a"
        )
        told = torch.frombuffer(bytearray(routes.experts), dtype=torch.uint8).view(-1, 2, 2)
        assert torch.equal(told.sort(-1).values.long(), expected.sort(-1).values)


def test_what_servers_chose_is_replayed_in_training(
    servers: OwnedServers, mixture: Path, tmp_path: Path
) -> None:
    answers = itertools.count()
    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    data = make_data(
        servers, lambda completion: float(next(answers) % 2), sampling=Sampling(max_new_tokens=20)
    )
    trainer.fit(make_module(mixture, router_replay=True), data)
    assert len(recorder.of("moe/replayed")) == 4
    assert min(recorder.of("moe/replayed")) > 0.8
    # Both sides compute in fp32: of some hundreds of choices hardly one is as near as that.
    assert max(recorder.of("moe/rerouted")) < 0.01
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-4
