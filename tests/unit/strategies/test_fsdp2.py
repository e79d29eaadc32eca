"""FSDP2Strategy's settings: refused where they can't work, when the Trainer is built."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from lightning_grpo.errors import ConfigError
from lightning_grpo.strategies import fsdp2
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy


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
