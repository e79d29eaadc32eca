"""A LoRA adapter through the whole loop: resumed exactly, exported, learning.

That servers get it merged: `conformance/test_updates.py`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.cli.folders import export
from lightning_grpo.datamodule import ReplayDataModule, RolloutDataModule
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.rewards import gsm8k
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.types import Sampling
from lightning_grpo.weights.gather import gather_weights
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer
from tests.fakes.recordings import write_recording
from tests.fakes.user_objects import make_adam


def fast_adam(params):
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)


def make_lora_module(model, **kwargs):
    return make_module(model, lora=LoRA(rank=4), optimizer=make_adam, **kwargs)


def test_a_checkpoint_exports_as_a_merged_folder_or_as_the_adapter(
    tiny_model, server, tmp_path, capsys
):
    module, trainer = make_lora_module(tiny_model), make_trainer(tmp_path)
    trainer.fit(module, make_data(server))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert export([str(tmp_path / "run.ckpt"), str(tmp_path / "merged")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    merged = gather_weights(module)
    assert all(torch.equal(exported[name], value) for name, value in merged.items())
    out = str(tmp_path / "adapter")
    assert export(["--adapter", str(tmp_path / "run.ckpt"), out]) == 0
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    capsys.readouterr()


def test_a_resumed_run_is_the_run_bit_for_bit(tiny_model, tmp_path):
    write_recording(tmp_path / "recording", 1, batches=4, groups=4, vocab=300)

    def fit(until, seed, ckpt_path=None):
        torch.manual_seed(seed)
        trainer, module = make_trainer(tmp_path, max_steps=until), make_lora_module(tiny_model)
        trainer.fit(module, ReplayDataModule(tmp_path / "recording"), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{until}.ckpt")
        return module.state_dict()

    expected = fit(4, seed=5)
    halfway = fit(2, seed=5)
    # Another seed: the adapter that goes on is the checkpoint's, not a new one.
    weights = fit(4, seed=6, ckpt_path=tmp_path / "2.ckpt")
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
        assert torch.equal(weights[name], halfway[name]) == ("lora_" not in name), name


def test_a_loaded_checkpoint_has_its_adapter(tiny_model, server, tmp_path):
    module, trainer = make_lora_module(tiny_model), make_trainer(tmp_path)
    trainer.fit(module, make_data(server))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = GRPOModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.lora == LoRA(rank=4)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_adapter_learns_the_quickstart(tmp_path):
    """The held-out accuracy of the model as it comes is 0.38; full training needs as long."""
    recorder = Recorder()
    data = RolloutDataModule(
        prompts=Prompts("shipped:quickstart/train.jsonl", column="question"),
        workflow=RLVRWorkflow(gsm8k, Sampling(max_new_tokens=56)),
        servers=EmbeddedServers(),
    )
    module = GRPOModule("shipped:quickstart", lora=LoRA(rank=16), optimizer=fast_adam)
    trainer = make_trainer(tmp_path, max_steps=20, gradient_clip_val=1.0, callbacks=[recorder])
    trainer.fit(module, data)
    rewards = [m["reward/mean"] for m in recorder.metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert max(m["mismatch/probe"] for m in recorder.metrics[1:]) < 1e-4
