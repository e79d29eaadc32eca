"""A hybrid through the whole loop: proved after every sync, exported, and resumed."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning_grpo.cli.export import export
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.certify.tiny import tiny_config
from lightning_grpo.policy.load import without_bars
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.weights.transport import DiskTransport
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer
from tests.fakes.tiny_model import make_tiny_tokenizer


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


def test_every_sync_of_a_hybrid_is_proved_and_it_is_exported_and_resumed(hybrid, tmp_path):
    answers = itertools.count()

    def alternating(completion: str) -> float:
        return float(next(answers) % 2)  # each group has something to learn

    recorder = Recorder()
    options = {"gradient_checkpointing": True, "max_tokens_per_microbatch": 64}
    options["router_replay"] = True
    module = make_module(hybrid, **options)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder, WeightSync(DiskTransport())])
    data = make_data(EmbeddedServers(), alternating)
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
    trainer.fit(again, make_data(EmbeddedServers(), alternating), ckpt_path=tmp_path / "run.ckpt")
    assert trainer.global_step == 5
