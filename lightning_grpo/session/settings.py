"""What a session needs to know; the data module fills it from its constructor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_grpo.evaluation import Evaluation
from lightning_grpo.policy.memory import ModelSize
from lightning_grpo.rollout.curriculum import Curriculum
from lightning_grpo.rollout.limits import RolloutLimits
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.protocols import RolloutWorkflow, Tokenizer
from lightning_grpo.servers.base import Servers
from lightning_grpo.types import Group, Prompt


@dataclass(frozen=True)
class SessionSettings:
    """What a session needs to know.

    Attributes:
        model_path: Folder or hub id that the servers load.
        run_dir: Logs, weights and trajectories of this run.
        prompts: Training prompts by dataset.
        val_prompts: Held-out prompts by name.
        workflow: Runs an episode.
        servers: Starts or finds servers.
        batch_size: Groups of a rollout batch.
        group_size: Trajectories of a group.
        max_staleness: In versions.
        limits: Of rollouts.
        evaluation: What validation samples.
        keep_group: Which groups are worth training on.
        curriculum: Leaves prompts out of a pass by their past success.
        make_prompt: A row as a prompt; None: the default of `prompts`.
        seed: Of sampling.
        deterministic: Take groups strictly in the order of admission, and ask servers to answer
            equal requests with equal bits.
        training_bytes: Estimates what the trainer needs of its GPU; None: it does not train.
        on_event: Told of every fetch, admission, finish, take, sync and advance.
    """

    model_path: str
    run_dir: Path
    prompts: Mapping[str, Prompts]
    val_prompts: Mapping[str, Prompts]
    workflow: RolloutWorkflow
    servers: Servers
    batch_size: int
    group_size: int
    max_staleness: int
    limits: RolloutLimits
    evaluation: Evaluation
    keep_group: Callable[[Group], bool] | None = None
    curriculum: Curriculum | None = None
    make_prompt: Callable[[Mapping[str, Any], Tokenizer], Prompt] | None = None
    seed: int = 0
    deterministic: bool = False
    training_bytes: Callable[[ModelSize], int] | None = None
    on_event: Callable[..., None] | None = None

    @property
    def order(self) -> dict[str, Any]:
        """What the order of the prompts follows from, by the names of the settings."""
        found: dict[str, Any] = {}
        for name, prompts in self.prompts.items():
            place = f"prompts.{name}" if name else "prompts"
            for setting in ("shuffle", "seed", "weight"):
                found[f"{place}.{setting}"] = vars(prompts)[setting]
        return found
