"""What is left of the difference between server and trainer once the server's experts are taken.

python benchmarks/router_replay.py --out benchmarks/results/router_replay.json

A Qwen3-MoE of random weights: 12 layers, 64 experts in each, 8 of them for each token, as many as
Qwen3-30B-A3B takes. The server computes in bf16 and tells its experts; the trainer computes the
same weights in fp32, with its own choice of experts and with the server's. What is left is the
rounding of the server's activations.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_grpo.algorithm.layers import Replay, RouteRecorder, routers_of
from lightning_grpo.policy.packed import PackedPolicy

SEQUENCES, LENGTH = 8, 256


def make_model(seed: int) -> Qwen3MoeForCausalLM:
    """Weights in bf16's numbers, spread so that distributions have a shape."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=512,
        moe_intermediate_size=192,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        initializer_range=0.05,
    )
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16)


@torch.no_grad()
def served(model: Qwen3MoeForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the server gives: logprobs, and the experts of each token; one sequence at a time."""
    recorder = RouteRecorder(routers_of(model))
    policy, parts = PackedPolicy(model), []
    for row in ids:
        logprobs, _ = policy(row)
        parts.append((logprobs.float(), recorder.take()))
    return torch.cat([each for each, _ in parts]), torch.cat([each for _, each in parts])


@torch.no_grad()
def apart(
    model: Qwen3MoeForCausalLM, ids: Tensor, server: Tensor, experts: Tensor
) -> dict[str, float]:
    """How far the trainer is from the server, with and without its experts."""
    policy = PackedPolicy(model, router_replay=True)
    bounds = torch.arange(0, ids.numel() + 1, ids.shape[1])
    found: dict[str, float] = {}
    for name, replay in (("own", None), ("replayed", Replay(experts))):
        difference = (policy(ids.flatten(), bounds, replay=replay)[0].float() - server).abs()
        found[f"{name}_mean"] = round(difference.mean().item(), 5)
        found[f"{name}_largest"] = round(difference.max().item(), 3)
        if replay is not None:
            found["rerouted"] = round(replay.metrics()["moe/rerouted"].value(), 4)
    return found


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: list[dict[str, float]] = []
    for seed in range(args.seeds):
        model = make_model(seed)
        ids = torch.randint(0, 2048, (SEQUENCES, LENGTH))
        server, experts = served(copy.deepcopy(model), ids)
        table.append(apart(model.float(), ids, server, experts))
        print(f"seed {seed}: {table[-1]}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
