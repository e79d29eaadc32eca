"""Stand-ins with the signatures of the public surface, for tests of the command line.

They validate like the real classes, train one number and start nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_grpo.errors import ConfigError
from lightning_grpo.types import Sampling
from tests.fakes.tiny_run import TinyData, TinyModule


class TokenMean:
    pass


class PolicyLoss:
    pass


class GRPOLoss(PolicyLoss):
    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
    ):
        if clip_low <= 0:
            raise ConfigError(f"`clip_low` must be > 0, got {clip_low}. The paper uses 0.2.")
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip


class GSPOLoss(PolicyLoss):
    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4):
        self.clip_low, self.clip_high = clip_low, clip_high


class Correction:
    pass


class TokenTIS(Correction):
    def __init__(self, cap: float = 2.0):
        self.cap = cap


class Prompts:
    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "prompt",
        limit: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ):
        self.path, self.name, self.limit = path, name, limit


class RolloutWorkflow:
    pass


class RLVRWorkflow(RolloutWorkflow):
    def __init__(
        self,
        reward: list[Callable] | Callable,
        sampling: Sampling = Sampling(),
        reward_weights: list[float] | None = None,
    ):
        self.reward, self.sampling = reward, sampling


class Servers(ABC):
    @abstractmethod
    def stop(self) -> None: ...


class EmbeddedServers(Servers):
    def stop(self) -> None:
        pass

    def __init__(self, num_servers: int = 1, max_running_requests: int = 64):
        self.num_servers = num_servers


class SGLangServers(EmbeddedServers):
    def __init__(
        self,
        num_servers: int | None = None,
        tp: int = 1,
        devices: list[int] | None = None,
        flags: dict[str, Any] | None = None,
    ):
        self.num_servers = num_servers


@dataclass(frozen=True)
class RolloutLimits:
    max_in_flight: int | None = None
    reward_timeout_s: float = 15
    reward_processes: int = 2


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-6)


class GRPOModule(TinyModule):
    def __init__(
        self,
        model: str,
        loss: PolicyLoss = GRPOLoss(),
        correction: Correction | None = None,
        entropy_coefficient: float = 0.0,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_tokens_per_microbatch: int = 16384,
        gradient_checkpointing: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model, self.loss, self.correction = model, loss, correction
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.optimizer = optimizer


class RolloutDataModule(TinyData):
    def __init__(
        self,
        prompts: Prompts,
        workflow: RolloutWorkflow,
        servers: Servers,
        val_prompts: Prompts | dict[str, Prompts] | None = None,
        batch_size: int = 16,
        group_size: int = 8,
        minibatches_per_batch: int = 1,
        passes_per_batch: int = 1,
        max_staleness: int = 1,
        keep_group: Callable | None = None,
        limits: RolloutLimits = RolloutLimits(),
    ):
        super().__init__()
        if group_size < 2:
            raise ConfigError(
                "`group_size` must be >= 2 (an advantage needs a baseline), "
                f"got {group_size}. Raise it, or subclass GRPOModule with another baseline."
            )
        self.prompts, self.workflow, self.servers = prompts, workflow, servers
        self.batch_size, self.group_size, self.limits = batch_size, group_size, limits
        self.max_staleness = max_staleness


def reward(completion: str, answer: str) -> float:
    return float(completion == answer)
