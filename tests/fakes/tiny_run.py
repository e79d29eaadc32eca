"""A module and a data module that train one number on made-up rollout batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import lightning as L
import torch

from lightning_grpo.types import Group, Prompt, Trajectory


def make_group(row: int = 0, rewards: tuple[float, ...] = (0.0, 1.0), version: int = 0) -> Group:
    """A group of two-token answers to a two-token prompt."""
    prompt = Prompt(
        input_ids=(5, 6),
        text=f"What is {row} + {row}?",
        messages=({"role": "user", "content": f"What is {row} + {row}?"},),
        columns={"answer": str(2 * row)},
        row=row,
    )
    trajectories = tuple(
        Trajectory(
            input_ids=(5, 6, 7, 8 + i),
            response_mask=(False, False, True, True),
            logprobs=(0.0, 0.0, -0.5, -0.25),
            versions=(-1, -1, version, version),
            reward=reward,
            rewards={"right": reward, "format": 1.0},
            text=f"answer {i}",
            truncated=False,
        )
        for i, reward in enumerate(rewards)
    )
    return Group(prompt, trajectories, admitted_version=version)


@dataclass
class TinyRollout:
    index: int
    version: int
    groups: list[Group] | None
    advantages: torch.Tensor = field(default_factory=lambda: torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    metrics: dict[str, float] = field(default_factory=lambda: {"time/wait_rollout_s": 0.5})
    policy_logprobs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


@dataclass
class TinyMinibatch:
    rollout: TinyRollout
    is_last: bool

    @property
    def is_first(self) -> bool:
        return not self.is_last


@dataclass
class TinyEvaluation:
    step: int
    metrics: dict[str, float]
    groups: dict[str, list[Group]] = field(default_factory=dict)


class TinyLoader:
    """Rollout batches of two groups, two optimizer steps each."""

    def __init__(self, num_rollouts: int) -> None:
        self.num_rollouts = num_rollouts

    def __len__(self) -> int:
        return 2 * self.num_rollouts

    def __iter__(self) -> Iterator[TinyMinibatch]:
        for index in range(self.num_rollouts):
            rollout = TinyRollout(index, index, [make_group(2 * index), make_group(2 * index + 1)])
            yield TinyMinibatch(rollout, is_last=False)
            yield TinyMinibatch(rollout, is_last=True)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class TinyModule(L.LightningModule):
    """Logs what a real module would, with made-up values."""

    def __init__(self, logged: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.logged = logged or {"reward/mean": 0.5, "reward/std": 0.5, "time/step_s": 2.0}

    def training_step(self, batch, batch_idx):
        self.log_dict(self.logged, batch_size=1)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.log_dict(
            {
                "eval/avg_at_1": 0.25,
                "eval/avg_at_1_ci95_low": 0.125,
                "eval/avg_at_1_ci95_high": 0.375,
            },
            batch_size=1,
        )

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def describe(self) -> dict[str, str]:
        return {"model": "tiny (1 parameter, float32)"}


class TinyData(L.LightningDataModule):
    """Serves TinyLoader; may carry finished validations."""

    def __init__(self, num_rollouts: int = 2, evaluations: list[TinyEvaluation] | None = None):
        super().__init__()
        self.num_rollouts = num_rollouts
        self.evaluations = evaluations or []

    def train_dataloader(self):
        return TinyLoader(self.num_rollouts)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def val_dataloader(self):
        return TinyLoader(1)

    def test_dataloader(self):
        return TinyLoader(1)

    def describe(self) -> dict[str, str]:
        return {"batch": "2 prompts x 2 samples\n2 optimizer steps each"}
