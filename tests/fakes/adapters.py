"""Policies with a LoRA adapter that is no longer where it began."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_grpo.policy.load import load_policy
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.packed import PackedPolicy

LORA = LoRA(rank=4, alpha=6)


def make_trained(folder: str) -> PackedPolicy:
    model = load_policy(folder)
    LORA.add_to(model)
    set_adapter(model)
    return PackedPolicy(model)


@torch.no_grad()
def set_adapter(model: nn.Module, seed: int = 1) -> None:
    """The same values whether the parameters are sharded or not."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value = torch.randn(parameter.shape, generator=generator) * 0.1
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
