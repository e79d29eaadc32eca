"""Micro-batches accumulate without communication; the last one reduces everything."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from lightning_grpo.strategies.fsdp2 import gradient_sync, parallelize


class Module(nn.Module):
    """As much of a LightningModule as is looked at."""

    def __init__(self, root: nn.Module, wrapped: nn.Module | None = None) -> None:
        super().__init__()
        self.root = root
        self.trainer = SimpleNamespace(strategy=SimpleNamespace(model=wrapped))


def test_one_device_needs_nothing():
    module = Module(nn.Linear(2, 2))
    for enabled in (False, True):
        with gradient_sync(module, enabled):
            module.root(torch.ones(1, 2)).sum().backward()
    assert torch.equal(module.root.weight.grad, torch.full((2, 2), 2.0))


def test_ddp_reduces_in_the_last_micro_batch_only(process_group):
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    module = Module(wrapped.module, wrapped)
    with gradient_sync(module, enabled=False):
        assert not wrapped.require_backward_grad_sync
    with gradient_sync(module, enabled=True):
        assert wrapped.require_backward_grad_sync


def test_sharded_gradients_appear_with_the_last_micro_batch(process_group):
    root = parallelize(nn.Sequential(nn.Linear(2, 2)), init_device_mesh("cpu", (1,)), blocks=[])
    assert isinstance(root, FSDPModule)
    module = Module(root)
    with gradient_sync(module, enabled=False):
        root(torch.ones(1, 2)).sum().backward()
    assert root[0].weight.grad is None  # held back, unreduced
    with gradient_sync(module, enabled=True):
        loss = root(torch.ones(1, 2)).sum()
    loss.backward()  # as Lightning does it, after the block
    assert torch.equal(root[0].weight.grad.full_tensor(), torch.full((2, 2), 2.0))
