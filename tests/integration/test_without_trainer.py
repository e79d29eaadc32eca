"""The data module in a program of the user's own, as under Fabric; the example is a slow test."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh

from lightning_grpo.loader import Prepared
from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import parallelize
from tests.fakes.loops import make_data, make_prompts


def prepare(batch):
    return Prepared(batch.rewards, torch.ones(len(batch.rewards), dtype=torch.bool))


def test_a_program_without_a_trainer_gets_rollouts_and_every_held_out_answer(
    tiny_model, server, tmp_path
):
    data = make_data(server, val_prompts=make_prompts(5))
    policy = PackedPolicy(load_policy(str(tiny_model)))
    try:
        data.start(str(tiny_model), run_dir=tmp_path)
        data.publish(policy, trained=False)
        batches = iter(data.batches(prepare))
        for version in (0, 1):
            answered = [batch for loader in data.val_dataloader() for batch in loader]
            assert sum(len(batch.sampled) for batch in answered) == 5
            batch = next(batches)
            assert batch.rollout.version == version
            assert batch.is_last
            data.publish(policy)
    finally:
        data.close()


def test_sharded_weights_that_are_published_under_inference_mode_can_train_afterwards(
    tiny_model, server, tmp_path, process_group
):
    """`validate` on GPUs publishes under it; FSDP keeps what it gathers there."""
    data = make_data(server)
    policy = parallelize(PackedPolicy(load_policy(str(tiny_model))), init_device_mesh("cpu", (1,)))
    try:
        data.start(str(tiny_model), run_dir=tmp_path)
        with torch.inference_mode():
            data.publish(policy, trained=False)
        logprobs, _ = policy(torch.arange(5, 15))
        logprobs.sum().backward()
        data.publish(policy)
    finally:
        data.close()
