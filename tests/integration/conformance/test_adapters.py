"""A LoRA adapter reaches any server as merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.algorithm.losses import KLPenalty
from lightning_grpo.policy.lora import LoRA
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer
from tests.fakes.user_objects import make_adam
from tests.sglang.server import Server


def test_the_servers_get_the_merged_weights_and_the_reference_is_the_base(
    server: Server, model_folder: Path, tmp_path: Path
) -> None:
    module = make_module(model_folder, lora=LoRA(rank=4), optimizer=make_adam, kl=KLPenalty(0.1))
    recorder, data = Recorder(), make_data(server.url)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    trainer.fit(module, data)
    assert data.session.report.probe_diff < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    # At the first step the policy is the base; then the adapter leaves it, and it alone.
    kl = [m["policy/kl_reference"] for m in recorder.metrics]
    assert kl[0] == pytest.approx(0.0, abs=1e-7)
    assert max(kl[1:]) > 1e-6
    assert max(m["mismatch/abs_logprob_diff"] for m in recorder.metrics) < 1e-4
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    own = {name.replace(".base_layer", ""): v for name, v in module.policy.model.named_parameters()}
    assert all(torch.equal(own[n], v) for n, v in base.items() if n in own)
