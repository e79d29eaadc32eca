"""What `parallelize` shards, and with which precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_grpo.errors import ConfigError
from lightning_grpo.strategies.fsdp2 import is_sharded, parallelize, reshard
from tests.fakes.tiny_lm import Policy, global_batch, make_lm


class Scaled(nn.Module):
    """Uses a float input beside its parameters, as a policy does with temperatures."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen: torch.dtype | None = None

    def forward(self, x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        self.seen = temperature.dtype
        return self.layer(x.to(self.layer.weight.dtype)) / temperature.unsqueeze(1)


@pytest.fixture
def mesh(process_group):
    return init_device_mesh("cpu", (1,))


def test_decoder_blocks_and_the_root_are_sharded_and_the_numbers_stay(mesh):
    policy = Policy(make_lm())
    ids = global_batch(0)
    expected = policy(ids).detach()
    assert parallelize(policy, mesh) is policy
    assert is_sharded(policy)
    sharded = [type(m).__name__ for m in policy.modules() if is_directly_sharded(m)]
    assert sharded == ["FSDPPolicy", "FSDPQwen3DecoderLayer", "FSDPQwen3DecoderLayer"]
    assert torch.equal(policy(ids).detach(), expected)


def is_directly_sharded(module: nn.Module) -> bool:
    return type(module).__name__.startswith("FSDP")


def test_the_root_keeps_full_parameters_after_a_forward_until_they_are_given_back(mesh):
    policy = parallelize(Policy(make_lm()), mesh)
    with torch.no_grad():
        policy(global_batch(0))
    head = policy.model.lm_head
    assert not isinstance(head.weight, DTensor)
    reshard(policy)
    assert isinstance(head.weight, DTensor)


def test_bfloat16_is_for_the_computation_alone(mesh):
    module = parallelize(Scaled(), mesh, blocks=[], param_dtype="bfloat16")
    temperature = torch.full((2,), 0.7, requires_grad=True)
    module(torch.ones(2, 4), temperature).sum().backward()
    assert module.seen == torch.float32  # 0.7 is no bfloat16 number
    assert module.layer.weight.dtype == torch.float32
    assert module.layer.weight.grad.dtype == torch.float32


def test_a_mesh_with_a_data_parallel_dimension_is_taken_apart(process_group):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    assert is_sharded(parallelize(Policy(make_lm()), mesh))
    other = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    with pytest.raises(ConfigError, match="'data_parallel', got"):
        parallelize(Policy(make_lm()), other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`blocks` must be given for Scaled"),
        ({"blocks": ["Block"]}, r"names \['Block'\], which the model has not. It has: Linear"),
        ({"blocks": [], "param_dtype": "int8"}, "`param_dtype` must be one of auto, bfloat16"),
        ({"blocks": [], "reduce_dtype": "half"}, "`reduce_dtype` must be one of"),
        ({"cpu_offload": True}, "`cpu_offload` needs a GPU"),
    ],
)
def test_a_setting_that_can_not_work_is_refused(mesh, settings, message):
    with pytest.raises(ConfigError, match=message):
        parallelize(Scaled(), mesh, **settings)
