"""Router replay through the whole loop: the trainer takes the experts that servers chose."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM

from lightning_grpo.algorithm.batch import Sequences
from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.errors import ConfigError
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.load import without_bars
from lightning_grpo.rollout.records import read_batch, trajectory_files
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from lightning_grpo.types import NO_VERSION, Sampling
from tests.fakes.forked_servers import ForkedServers
from tests.fakes.loops import NeverServers, Recorder, make_data, make_module, make_trainer
from tests.fakes.mixtures import own_routes
from tests.fakes.ranks import run_ranks
from tests.fakes.tiny_model import make_tiny_model

LAYERS = 3
TRAINED = ("policy/loss", "policy/grad_norm", "mismatch/abs_logprob_diff", "moe/rerouted")


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


class Weights(Callback):
    """Keeps the model of each version."""

    def __init__(self):
        self.versions = []

    def on_train_start(self, trainer, pl_module):
        self.versions.append(copy.deepcopy(pl_module.policy.model.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.versions.append(copy.deepcopy(pl_module.policy.model.state_dict()))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A Qwen3-MoE of three layers, 16 experts each."""
    torch.set_num_threads(1)
    with without_bars():
        return make_tiny_model(
            tmp_path_factory.mktemp("mixture"), hidden_size=32, num_layers=LAYERS, num_experts=16,
            tie_word_embeddings=False,
        )  # fmt: skip


def alternating():
    """A reward by which each group has something to learn."""
    answers = itertools.count()
    return lambda completion: float(next(answers) % 2)


def fit(folder, module, *callbacks, steps=2, max_new_tokens=24, **settings):
    recorder = Recorder()
    trainer = make_trainer(folder, callbacks=[recorder, *callbacks], max_steps=steps)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    data = make_data(ForkedServers(), alternating(), sampling=sampling, **settings)
    trainer.fit(module, data)
    return recorder


def recorded(folder):
    groups = [group for file in trajectory_files(folder) for group in read_batch(file).groups]
    return [trajectory for group in groups for trajectory in group.trajectories]


def test_logprobs_agree_better_where_the_server_s_experts_are_taken(mixture, tmp_path):
    found = {}
    for replays in (False, True):
        module = make_module(mixture, RoundingModule, router_replay=replays)
        recorder = fit(tmp_path / str(replays), module, batch_size=4, group_size=4)
        found[replays] = recorder.of("mismatch/abs_logprob_diff")
        assert bool(recorder.of("moe/replayed")) is replays
    assert 0.0 < recorder.of("moe/rerouted")[0] < 0.02
    assert max(found[True]) < min(found[False]) / 4


def test_tokens_keep_the_experts_of_the_weights_that_sampled_them_over_updates(mixture, tmp_path):
    weights, module = Weights(), make_module(mixture, router_replay=True)
    module._optimizer = lambda params: torch.optim.SGD(params, lr=0.5)
    fit(tmp_path, module, weights, steps=5, max_new_tokens=150, max_staleness=1)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    seen = {"own": 0, "other": 0, "all": 0}
    for trajectory in recorded(tmp_path):
        versions = sorted(set(trajectory.versions) - {NO_VERSION})
        if len(versions) == 1:
            continue
        assert len(trajectory.routes) == len(trajectory.input_ids) - 1
        ids = torch.tensor(trajectory.input_ids)
        packed = Sequences.from_trajectories([trajectory], [0])
        told = packed.routes[:-1].sort(-1).values.long()
        # The route of a token stands for the pass that sampled the one behind it; the first pass
        # read the prompt.
        sampled_by = torch.tensor(trajectory.versions)[1:]
        sampled_by[sampled_by == NO_VERSION] = versions[0]
        for version in versions:
            model.load_state_dict(weights.versions[version])
            own = own_routes(model, ids, torch.tensor([0, len(ids)]))[:-1].sort(-1).values
            same = (own == told).all(-1).float().mean(-1)
            seen["own"] += same[sampled_by == version].sum().item()
            seen["other"] += same[sampled_by != version].sum().item()
        seen["all"] += len(told)
    assert seen["all"] > 100
    assert seen["own"] > 0.999 * seen["all"]
    assert seen["other"] < 0.9 * seen["all"]


def replay(folder, to, strategy="auto", devices=1, replays=True, **settings):
    recorder, module = Recorder(), make_module(folder, router_replay=replays, **settings)
    trainer = make_trainer(
        to, callbacks=[recorder], strategy=strategy, devices=devices, max_steps=10**6
    )
    trainer.fit(module, ReplayDataModule(str(to.parent)))
    return [{name: step.get(name) for name in TRAINED} for step in recorder.metrics]


def replay_on_ranks(folder, to):
    settings = {"gradient_checkpointing": True, "max_tokens_per_microbatch": 90}
    together = FSDP2Strategy(sequence_parallel_size=2)
    return [
        replay(folder, to / name, strategy, 2, **settings)
        for name, strategy in {"apart": "fsdp2", "together": together}.items()
    ]


@pytest.mark.slow
def test_a_recording_is_replayed_with_its_experts_on_one_rank_and_sharded_over_two(
    mixture, tmp_path
):
    recorder = fit(tmp_path, make_module(mixture, router_replay=True), steps=3)
    live = [{name: step.get(name) for name in TRAINED} for step in recorder.metrics]
    assert len(live) == 3
    again = replay(mixture, tmp_path / "again")
    (sharded, together), _ = run_ranks(replay_on_ranks, 2, mixture, tmp_path)
    for name in TRAINED:
        expected = [step[name] for step in live]
        assert [step[name] for step in again] == pytest.approx(expected, abs=1e-6)
        for ranks in (sharded, together):
            assert [step[name] for step in ranks] == pytest.approx(expected, abs=2e-5)
    without = replay(mixture, tmp_path / "without", replays=False)
    assert [step["moe/rerouted"] for step in without] == [None] * 3


def test_a_run_without_replay_neither_asks_for_routes_nor_keeps_any(mixture, tmp_path):
    fit(tmp_path, make_module(mixture))
    assert {trajectory.routes for trajectory in recorded(tmp_path)} == {None}
    with pytest.raises(ConfigError, match="`router_replay` needs trajectories with `routes`"):
        replay(mixture, tmp_path / "again")


def test_a_model_without_routers_is_refused_before_servers_start(tiny_model, tmp_path):
    servers = NeverServers()
    with pytest.raises(ConfigError, match=r"`router_replay` needs a mixture of experts"):
        make_trainer(tmp_path).fit(make_module(tiny_model, router_replay=True), make_data(servers))
    assert not servers.started


def test_retraction_is_refused_where_tokens_must_keep_their_experts(mixture, tmp_path):
    with pytest.raises(ConfigError, match="must not be retract with `router_replay`"):
        fit(tmp_path, make_module(mixture, router_replay=True), WeightSync(interruption="retract"))
