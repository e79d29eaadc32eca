"""LoRA on real ranks: built on the meta device, merged from shards, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.algorithm.losses import KLPenalty
from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.policy.load import load_policy, materialize_from_folder
from lightning_grpo.policy.lora import WithoutAdapter
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy, parallelize
from lightning_grpo.weights.gather import gather_weights
from tests.fakes.adapters import LORA, make_trained, set_adapter
from tests.fakes.causal_models import make_sequences, pack
from tests.fakes.loops import Recorder, make_module, make_trainer
from tests.fakes.ranks import init_gloo, run_ranks
from tests.fakes.recordings import write_recording
from tests.fakes.tiny_model import make_tiny_model
from tests.fakes.user_objects import make_adam


def sharded(folder):
    """One rank from the meta device: merged weights, the reference, and gradients after it."""
    torch.set_num_threads(1)
    _, world_size = init_gloo()
    model = load_policy(folder, meta=True)
    LORA.add_to(model)
    policy = PackedPolicy(model)
    parallelize(policy, init_device_mesh("cpu", (world_size,)))
    materialize_from_folder(model, folder, adapt=LORA.add_to)
    begins = {n: p.full_tensor().tolist() for n, p in model.named_parameters() if "lora_" in n}
    set_adapter(model)
    packed = pack(make_sequences([9, 12]))
    with torch.no_grad():
        reference, _ = WithoutAdapter(policy)(*packed)
    logprobs, _ = policy(*packed)
    logprobs.sum().backward()
    gradients = sum(p.grad is not None for p in model.parameters())
    merged = {name: value.tolist() for name, value in gather_weights(policy).items()}
    dist.destroy_process_group()
    return begins, reference.tolist(), logprobs.tolist(), gradients, merged


def test_two_sharded_ranks_from_the_meta_device_equal_one_whole_policy(tmp_path):
    disable_progress_bar()  # its monitor thread would outlive the test
    folder = str(make_tiny_model(tmp_path / "model", hidden_size=32))
    packed = pack(make_sequences([9, 12]))
    policy = make_trained(folder)
    expected, _ = policy(*packed)
    base, _ = PackedPolicy(load_policy(folder))(*packed)
    results = run_ranks(sharded, 2, folder)
    for begins, reference, logprobs, gradients, _ in results:
        assert begins == results[0][0]
        for name, value in begins.items():
            assert (torch.tensor(value) == 0).all() == ("lora_B" in name), name
        assert torch.allclose(torch.tensor(reference), base, atol=1e-6)
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-5)
        assert gradients == 2 * 2 * 7
    merged = results[0][4]
    for name, value in gather_weights(policy).items():
        assert torch.allclose(torch.tensor(merged[name]), value, atol=1e-6), name


def fit(
    folder: str, name: str, strategy: Any, ckpt_path: str | None = None
) -> list[dict[str, float]]:
    recorder = Recorder()
    kept = ModelCheckpoint(Path(folder) / name, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = make_trainer(
        Path(folder) / "run",
        devices=2,
        strategy=strategy,
        max_steps=4,
        callbacks=[recorder, kept],
        enable_checkpointing=True,
    )
    module = make_module(f"{folder}/model", lora=LORA, optimizer=make_adam, kl=KLPenalty(0.1))
    trainer.fit(module, ReplayDataModule(f"{folder}/recording"), ckpt_path=ckpt_path)
    logged = ("policy/loss", "policy/grad_norm", "policy/kl_reference")
    return [{k: m[k] for k in logged} for m in recorder.metrics]


def train_and_resume(folder: str) -> dict[str, list[dict[str, float]]]:
    whole = fit(folder, "whole", FSDP2Strategy(save_distributed_checkpoint=False))
    file = f"{folder}/whole/step=2.ckpt"
    sharded = fit(folder, "sharded", "fsdp2", file)
    shards = f"{folder}/sharded/step=3.ckpt"
    return {
        "whole": whole,
        "fsdp2, from a file": sharded,
        "fsdp2, from shards": fit(folder, "again", "fsdp2", shards),
        "ddp, from a file": fit(folder, "ddp", "ddp", file),
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_adapters_train_and_resume_under_fsdp2_and_ddp(tmp_path):
    disable_progress_bar()  # its monitor thread would outlive the test
    make_tiny_model(tmp_path / "model", hidden_size=32)
    write_recording(tmp_path / "recording", 1, batches=4, groups=4, vocab=300)
    for curves in run_ranks(train_and_resume, 2, str(tmp_path), timeout_s=200):
        whole = curves.pop("whole")
        assert len(whole) == 4
        assert whole[0]["policy/kl_reference"] == pytest.approx(0.0, abs=1e-7)
        assert whole[3]["policy/kl_reference"] > 1e-6
        for way, resumed in curves.items():
            assert len(resumed) == (1 if "shards" in way else 2)
            for found, expected in zip(resumed, whole[-len(resumed) :], strict=True):
                assert found == pytest.approx(expected, abs=1e-5), way
