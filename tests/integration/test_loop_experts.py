"""Mixtures of experts and hybrids through the whole loop: what servers get is what they need."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.certify.tiny import tiny_config
from lightning_grpo.cli.folders import export
from lightning_grpo.engine.model import ModelRunner, load_model
from lightning_grpo.engine.updates import ModelWeights
from lightning_grpo.errors import WeightSyncError
from lightning_grpo.naming import CheckpointNames
from lightning_grpo.policy.load import without_bars
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.session.proof import TrainerProof
from lightning_grpo.weights.gather import gather_weights
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.proof import Probe, ServerProof
from lightning_grpo.weights.transport import DiskTransport
from tests.fakes.faulty_parts import swap
from tests.fakes.forked_servers import ForkedServers
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer
from tests.fakes.tiny_model import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A Qwen3-MoE of two layers, five experts each."""
    torch.set_num_threads(1)
    with without_bars():
        return make_tiny_model(
            tmp_path_factory.mktemp("mixture"), hidden_size=32, num_experts=5,
            tie_word_embeddings=False,
        )  # fmt: skip


@pytest.fixture
def alternating():
    """A reward by which each group has something to learn."""
    answers = itertools.count()

    def reward(completion: str) -> float:
        return float(next(answers) % 2)

    return reward


def checkpoint(model, folder):
    with without_bars():
        model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("transport", [DiskTransport, ProcessGroupTransport])
def test_every_sync_of_a_mixture_is_proved_and_what_is_written_is_a_checkpoint(
    transport, mixture, alternating, tmp_path
):
    recorder, module = Recorder(), make_module(mixture)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder, WeightSync(transport())])
    data = make_data(ForkedServers(), alternating)
    trainer.fit(module, data)
    assert len(recorder.of("mismatch/probe")) == 3
    assert max(recorder.of("mismatch/probe")) < 1e-4
    assert max(recorder.of("mismatch/sent")) < 1e-4
    assert data.session.report.probe_diff < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-5
    trained = checkpoint(module.policy.model, tmp_path / "trained")
    before = load_file(mixture / "model.safetensors")
    experts = [name for name in trained if ".experts." in name]
    assert len(experts) == 2 * 5 * 3
    assert any(not torch.equal(trained[name], before[name]) for name in experts)
    if transport is DiskTransport:
        (folder,) = tmp_path.rglob("v000004")
        written = load_file(folder / "model.safetensors")
        assert written.keys() == trained.keys()
        assert all(torch.equal(written[name], trained[name]) for name in written)
        with without_bars():
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        held = module.policy.model.state_dict()
        assert all(torch.equal(value, held[n]) for n, value in loaded.state_dict().items())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with without_bars():
        assert export([str(tmp_path / "run.ckpt"), str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in exported)


FAULTS = {
    "two experts permuted": (
        "layers.0.mlp.experts.0.down_proj",
        "layers.0.mlp.experts.3.down_proj",
    ),
    "gate and up swapped": ("layers.1.mlp.experts.2.gate_proj", "layers.1.mlp.experts.2.up_proj"),
    "": ("", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_experts_that_reach_a_server_in_each_other_s_place_are_caught_by_the_proof(fault, mixture):
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
        runner = ModelRunner(load_model(str(mixture)))
    policy = PackedPolicy(model)
    sequences = tuple(tuple((7 * i * i + k) % 300 for i in range(40)) for k in range(4))
    weights = gather_weights(policy)
    sent = TrainerProof(Probe(sequences), ["float32"]).score(policy, weights)
    travels = CheckpointNames(policy.model).of(weights)
    if fault:
        travels = swap(travels, *FAULTS[fault])
    ModelWeights(runner.model).writer(travels, complete=True)()
    scores = [[0.0, *runner.score(list(ids), 0)[1].tolist()] for ids in sequences]
    proof = ServerProof(Probe(sequences))
    assert proof.agrees(sent, scores, "float32") is not bool(fault)
    if fault:
        with pytest.raises(WeightSyncError, match="holds other weights than were sent"):
            proof.check("http://x", 1, sent, scores, "float32")
    else:
        assert proof.check("http://x", 1, sent, scores, "float32").diff < 1e-6


# -- hybrids --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A Qwen3-Next of two layers, with states, attention and experts, and its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("hybrid"), make_tiny_tokenizer()
    tiny = tiny_config(CONFIG_MAPPING["qwen3_next"]())
    tiny.update({"vocab_size": 320, "bos_token_id": None, "tie_word_embeddings": False})
    tiny.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    with without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_sync_of_a_hybrid_is_proved_and_it_is_exported_and_resumed(
    hybrid, alternating, tmp_path
):
    recorder = Recorder()
    options = {"gradient_checkpointing": True, "max_tokens_per_microbatch": 64}
    options["router_replay"] = True
    module = make_module(hybrid, **options)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder, WeightSync(DiskTransport())])
    data = make_data(ForkedServers(), alternating)
    trainer.fit(module, data)
    assert len(recorder.of("mismatch/probe")) == 3
    assert max(recorder.of("mismatch/probe")) < 1e-4
    assert max(recorder.of("mismatch/sent")) < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-5
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with without_bars():
        assert export([str(tmp_path / "run.ckpt"), str(tmp_path / "out")]) == 0
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    held = module.policy.model.state_dict()
    assert all(torch.equal(value, held[n]) for n, value in loaded.state_dict().items())
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == load_file(hybrid / "model.safetensors").keys()
    again = make_module(hybrid, **options)
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.fit(again, make_data(ForkedServers(), alternating), ckpt_path=tmp_path / "run.ckpt")
    assert trainer.global_step == 5
