"""FSDP2Strategy's settings: refused where they can't work, when the Trainer is built."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_grpo.errors import ConfigError
from lightning_grpo.strategies import fsdp2
from lightning_grpo.strategies.fsdp2 import (
    FSDP2Strategy,
    gradient_sync,
    is_sharded,
    parallelize,
    reshard,
)
from tests.fakes.tiny_lm import Policy, global_batch, make_lm


def trainer(strategy: object, **kwargs: object) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", devices=1, strategy=strategy, **quiet, **kwargs)


def test_the_strategy_is_known_by_name():
    assert fsdp2.REGISTERED_NAME == "fsdp2"
    assert isinstance(trainer("fsdp2").strategy, FSDP2Strategy)


def test_a_name_that_is_taken_gets_a_prefix_and_a_warning():
    ours = StrategyRegistry.pop("fsdp2")
    StrategyRegistry.register("fsdp2", nn.Module)
    try:
        with pytest.warns(UserWarning, match="is taken by torch"):
            assert fsdp2.register() == "grpo_fsdp2"
    finally:
        StrategyRegistry.pop("fsdp2")
        StrategyRegistry.pop("grpo_fsdp2", None)
        StrategyRegistry["fsdp2"] = ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fsdp2.register() == "fsdp2"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_precision_of_the_trainer_is_refused(precision):
    with pytest.raises(ConfigError, match="`precision` must be 32-true"):
        trainer(FSDP2Strategy(), precision=precision)


def test_a_data_parallel_size_that_is_not_the_number_of_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"`data_parallel_size` must be auto or .* \(1\), got 2"):
        trainer(FSDP2Strategy(data_parallel_size=2))


@pytest.mark.parametrize(
    ("shard_size", "message"),
    [
        (
            2,
            r"`shard_size` must divide the number of ranks \(1\), got 2.*number of GPUs of a",
        ),
        (0, "`shard_size` must be"),
        (True, "`shard_size` must be"),
    ],
)
def test_a_shard_size_that_leaves_ranks_over_is_refused(shard_size, message):
    with pytest.raises(ConfigError, match=message):
        trainer(FSDP2Strategy(shard_size=shard_size))


@pytest.mark.parametrize(
    ("size", "message"),
    [(2, r"must divide the number of ranks \(1\), got 2"), (0, "must be"), (True, "must be")],
)
def test_a_number_of_ranks_for_each_row_that_leaves_some_over_is_refused(size, message):
    with pytest.raises(ConfigError, match=f"`sequence_parallel_size` {message}"):
        trainer(FSDP2Strategy(sequence_parallel_size=size))


def test_cpu_offload_is_refused_on_the_cpu():
    with pytest.raises(ConfigError, match="`cpu_offload` needs a GPU"):
        trainer(FSDP2Strategy(cpu_offload=True))


class NoRoot(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Leaky(NoRoot):
    """A trainable parameter that the root has not."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Linear(2, 2)

    def sharding_root(self) -> nn.Module:
        return self.root


class HalfBuilt(L.LightningModule):
    """On the meta device, without a way to fill it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.root = nn.Linear(2, 2)

    def sharding_root(self) -> nn.Module:
        return self.root


class Unfilled(HalfBuilt):
    def materialize(self, module: nn.Module, device: torch.device) -> None:
        pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoRoot(), r"must have a method `sharding_root\(\)`"),
        (Leaky(), "must hold every trainable parameter .* layer.weight, layer.bias"),
        (HalfBuilt(), "has no method `materialize"),
        (Unfilled(), "2 are still on the meta device: weight, bias"),
    ],
)
def test_a_module_that_can_not_be_sharded_says_what_is_missing(module, message, process_group):
    runner = trainer(FSDP2Strategy(blocks=[]))
    strategy = runner.strategy
    strategy.connect(module)
    strategy.setup_environment()
    with pytest.raises(ConfigError, match=message):
        strategy.setup(runner)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_the_ranks_of_gpus_can_reduce_what_lies_in_host_memory_too(device, backend):
    strategy = FSDP2Strategy()
    strategy.cluster_environment = LightningEnvironment()
    strategy.parallel_devices = [torch.device(device, 0)]
    assert strategy._get_process_group_backend() == backend


# ---- what `parallelize` shards, and with which precision ----------------------------------------


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


# ---- micro-batches accumulate without communication; the last one reduces everything ------------


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


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.own = inner, nn.Linear(2, 2)

    def forward(self, values):
        return self.own(self.inner(values))


def test_blocks_inside_of_others_are_sharded_first_and_shared_ones_with_the_root(process_group):
    shared = nn.Linear(2, 2)
    root = nn.Sequential(Block(shared), Block(shared), Block(Block(nn.Linear(2, 2))))
    parallelize(root, init_device_mesh("cpu", (1,)), blocks=["Block"])
    apart = [name for name, each in root.named_modules() if isinstance(each, FSDPModule)]
    assert apart == ["", "2", "2.inner"]
    assert all(isinstance(parameter, DTensor) for parameter in root.parameters())
    root(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in root.parameters())
