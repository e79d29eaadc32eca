"""The Fabric form, and the packed policy under sharding: the numbers of one plain process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.nn import functional as F

from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import parallelize, reshard
from tests.fakes.ranks import ROOT, run_ranks
from tests.fakes.tiny_lm import VOCAB, Policy, global_batch, make_lm


def train_with_fabric(world_size: int) -> tuple[list[float], list[float]]:
    strategy = ModelParallelStrategy(
        parallelize, data_parallel_size=world_size, tensor_parallel_size=1
    )
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.launch()
    policy = fabric.setup_module(Policy(make_lm(seed=3)))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(policy.parameters(), lr=1e-2))
    losses, norms = [], []
    for step in range(3):
        batch = global_batch(step)
        total = torch.zeros(())
        micro_batches = batch[fabric.global_rank :: world_size].chunk(2)
        for k, ids in enumerate(micro_batches):
            with fabric.no_backward_sync(policy, enabled=k == 0):
                logits = policy(ids)[:, :-1].reshape(-1, VOCAB)
                summed = F.cross_entropy(logits, ids[:, 1:].reshape(-1), reduction="sum")
                loss = summed / batch[:, 1:].numel()
                fabric.backward(loss * world_size)
            total += loss.detach()
        losses.append(float(fabric.all_reduce(total, reduce_op="sum")))
        norm = fabric.clip_gradients(policy, optimizer, max_norm=0.5)
        norms.append(float(norm.full_tensor()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def test_parallelize_in_fabric_gives_the_same_losses_on_one_and_two_ranks():
    (single,) = run_ranks(train_with_fabric, 1, 1)
    for losses, norms in run_ranks(train_with_fabric, 2, 2):
        assert torch.allclose(torch.tensor(losses), torch.tensor(single[0]), atol=1e-5)
        assert torch.allclose(torch.tensor(norms), torch.tensor(single[1]), atol=1e-4)
    assert single[0][0] > single[0][-1]


def packed(sharded: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh

    from tests.fakes.ranks import init_gloo

    _, world_size = init_gloo()
    policy = PackedPolicy(make_lm(seed=3), max_logits=7 * VOCAB)
    if sharded:
        parallelize(policy, init_device_mesh("cpu", (world_size,)))
    ids = global_batch(0).reshape(-1)
    cu_seqlens = torch.arange(0, len(ids) + 1, 12)
    temperature = torch.full((len(ids),), 0.7)
    with torch.no_grad():
        anchor, _ = policy(ids, cu_seqlens, temperature)
    logprobs, entropy = policy(ids, cu_seqlens, temperature, with_entropy=True)
    assert torch.equal(anchor, logprobs.detach())
    (logprobs.mean() + entropy.mean()).backward()
    reshard(policy)
    grads = {
        name: p.grad.full_tensor() if sharded else p.grad for name, p in policy.named_parameters()
    }
    return logprobs.detach(), entropy.detach(), grads


def test_the_packed_policy_has_the_same_logprobs_and_gradients_when_sharded():
    ((logprobs, entropy, grads),) = run_ranks(packed, 1, False)
    for found in run_ranks(packed, 2, True):
        assert torch.allclose(found[0], logprobs, atol=1e-6)
        assert torch.allclose(found[1], entropy, atol=1e-6)
        assert found[2].keys() == grads.keys()
        for name, grad in grads.items():
            assert torch.allclose(found[2][name], grad, atol=1e-6), name


# -- ranks that Lightning forks, as in a notebook, or spawns, from a program of the user's ---------


PROGRAM = """
import sys
from pathlib import Path
from lightning_grpo import EmbeddedServers
from tests.fakes.loops import make_data, make_module, make_trainer

if __name__ == "__main__":
    model, folder, strategy = sys.argv[1:]
    trainer = make_trainer(Path(folder), strategy=strategy, devices=2, max_steps=2)
    trainer.fit(make_module(model), make_data(EmbeddedServers()))
    print("status", trainer.state.status)
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_ranks_that_are_forked_or_spawned_train(tiny_model, tmp_path, strategy):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(tiny_model), str(tmp_path), strategy]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "FINISHED" in run.stdout
    assert "`max_steps=2` reached" in run.stderr
