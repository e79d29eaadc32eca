"""The whole loop in a few lines: a tiny model, prompts in memory, real servers, a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.module import GRPOModule
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.servers.base import RunningServers, Servers
from lightning_grpo.types import Sampling
from lightning_grpo.validation import Evaluation

INLINE = RolloutLimits(reward_processes=0)


def odd_reward(completion: str) -> float:
    """A reward that a random model's completions differ in."""
    return float(sum(map(ord, completion)) % 2)


def make_prompts(num_rows: int = 12, **kwargs: Any) -> Prompts:
    """Rows with the columns `question` and `answer`."""
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(num_rows)]
    return Prompts(rows, column="question", **kwargs)


def make_data(servers: Servers | str, reward: Any = odd_reward, **kwargs: Any) -> RolloutDataModule:
    """Two groups of two, answers of up to six tokens.

    Args:
        servers: Or the URL of one that runs.
        reward: Or several.
        kwargs: Of the data module; `prompts` and `sampling` too; `cls` is its class.
    """
    if isinstance(servers, str):
        servers = RunningServers([servers], connect_timeout_s=2.0)
    sampling = kwargs.pop("sampling", Sampling(max_new_tokens=6))
    cls = kwargs.pop("cls", RolloutDataModule)
    settings: dict[str, Any] = {
        "prompts": make_prompts(),
        "workflow": RLVRWorkflow(reward, sampling),
        "servers": servers,
        "batch_size": 2,
        "group_size": 2,
        "max_staleness": 0,
        "evaluation": Evaluation(num_samples=1, greedy=False),
        "limits": INLINE,
    }
    return cls(**{**settings, **kwargs})


def sgd(params: Any) -> torch.optim.Optimizer:
    """Large enough a step that weights differ after it."""
    return torch.optim.SGD(params, lr=0.05)


def make_module(model: Path | str, cls: type[GRPOModule] = GRPOModule, **kwargs: Any) -> GRPOModule:
    """A module on that folder; SGD unless told otherwise."""
    return cls(str(model), **{"optimizer": sgd, **kwargs})


def make_trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    """A silent Trainer on the CPU, two steps."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "log_every_n_steps": 1,
    }
    if "max_epochs" in kwargs or "max_time" in kwargs:
        settings["max_steps"] = -1
    return L.Trainer(**{**settings, **kwargs})


class Recorder(Callback):
    """Keeps what every step logged, trained on and left behind."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.batches: list[Any] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.batches.append(batch)
        self.steps.append(trainer.global_step)

    def of(self, name: str) -> list[float]:
        """A metric of the steps that measured it."""
        return [metrics[name] for metrics in self.metrics if name in metrics]


class Events:
    """An event log that any thread may write to (appending to a list is atomic)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, **data: Any) -> None:
        self.log.append((name, data))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.log]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [data for n, data in self.log if n == name]


class NeverServers(Servers):
    """For runs that must be refused before anything is started."""

    def __init__(self) -> None:
        self.started = False

    @property
    def handles(self):
        return []

    def start(self, model_path, run_dir):
        self.started = True
        raise AssertionError("servers were started")

    def stop(self) -> None:
        pass
