"""Router replay through the whole loop: the trainer takes the experts that servers chose."""

from __future__ import annotations

import pytest
import torch

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.errors import ConfigError
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.load import without_bars
from lightning_grpo.rollout.records import read_batch, trajectory_files
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.types import Sampling
from tests.fakes.loops import NeverServers, Recorder, make_data, make_module, make_trainer
from tests.fakes.tiny_model import make_tiny_model


class RoundingModule(GRPOModule):
    """Its routers see, in training, hidden states rounded as bf16 does: they choose otherwise."""

    def build_policy(self):
        model = super().build_policy()
        for module in model.modules():
            if type(module).__name__.endswith("Router"):
                module.register_forward_pre_hook(rounded)
        return model


def rounded(_, args):
    if torch.is_grad_enabled():
        return tuple(value.bfloat16().float() for value in args)
    return None


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A Qwen3-MoE of three layers, 16 experts each."""
    torch.set_num_threads(1)
    with without_bars():
        return make_tiny_model(
            tmp_path_factory.mktemp("mixture"), hidden_size=32, num_layers=3, num_experts=16,
            tie_word_embeddings=False,
        )  # fmt: skip


def fit(folder, module, **settings):
    recorder = Recorder()
    trainer = make_trainer(folder, callbacks=[recorder], **settings)
    data = make_data(
        EmbeddedServers(), sampling=Sampling(max_new_tokens=24), batch_size=4, group_size=4
    )
    trainer.fit(module, data)
    return recorder


def test_logprobs_agree_better_where_the_server_s_experts_are_taken(mixture, tmp_path):
    found = {}
    for replays in (False, True):
        module = make_module(mixture, RoundingModule, router_replay=replays)
        recorder = fit(tmp_path / str(replays), module)
        found[replays] = recorder.of("mismatch/abs_logprob_diff")
        assert bool(recorder.of("moe/replayed")) is replays
    print(found, recorder.of("moe/replayed"), recorder.of("moe/rerouted"))
    assert max(found[True]) < min(found[False]) / 4
