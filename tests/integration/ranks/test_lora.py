"""LoRA under FSDP2: built on the meta device, merged from shards, with the base as reference."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.lora import WithoutAdapter
from lightning_grpo.policy.materialize import materialize_from_folder
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.parallelize import parallelize
from lightning_grpo.weights.gather import gather_weights
from tests.fakes.adapters import LORA, make_trained, set_adapter
from tests.fakes.causal_models import make_sequences, pack
from tests.fakes.ranks import init_gloo, run_ranks
from tests.fakes.tiny_model import make_tiny_model


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
