"""GRPO post-training of language models for people who know Lightning.

The loop, which runs while `Trainer.fit` does what it always does:

    prompts -> producer -> workflow -> server pool -> SGLang or the embedded engine
                  |            |
                 gate       rewards           (rank 0, one event loop in one thread)
                  v
    finished groups -> take(B) -> advantages -> each rank's share -> minibatches
    minibatch -> packed micro-batches -> loss -> one optimizer step
    last minibatch of the batch -> WeightSync -> servers, verified -> gate.advance(version)

Names are resolved on first use, so that importing the package imports neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "lightning_grpo.agents.agent_workflow": ("AgentWorkflow",),
    "lightning_grpo.agents.multi_turn": ("MultiTurnWorkflow",),
    "lightning_grpo.agents.record": ("EpisodeRecord",),
    "lightning_grpo.agents.tool_process": ("ToolLimits",),
    "lightning_grpo.agents.tool_workflow": ("ToolWorkflow",),
    "lightning_grpo.agents.turns": ("next_ids",),
    "lightning_grpo.algorithm.advantages": (
        "GroupAdvantage",
        "LeaveOneOutAdvantage",
        "ReinforceAdvantage",
        "group_mean",
        "group_std",
    ),
    "lightning_grpo.algorithm.aggregation": ("ConstantLength", "SequenceMean", "TokenMean"),
    "lightning_grpo.algorithm.batch": ("MicroBatch", "RolloutBatch"),
    "lightning_grpo.algorithm.corrections": (
        "OPSM",
        "GeometricMask",
        "IcePop",
        "SequenceTIS",
        "TokenTIS",
    ),
    "lightning_grpo.algorithm.kl": ("K1", "K2", "K3", "KLPenalty", "WeightedK3"),
    "lightning_grpo.algorithm.losses": (
        "CappedCISPOLoss",
        "CISPOLoss",
        "GRPOLoss",
        "GSPOLoss",
        "PolicyLoss",
    ),
    "lightning_grpo.algorithm.metrics": ("Max", "Mean", "Sum"),
    "lightning_grpo.algorithm.minibatch_loss": ("minibatch_loss",),
    "lightning_grpo.algorithm.truncation": ("Truncation",),
    "lightning_grpo.algorithm.trust_losses": ("DPPOLoss", "M2POLoss", "SAPOLoss"),
    "lightning_grpo.callbacks.health": ("HealthMonitor",),
    "lightning_grpo.callbacks.progress": ("GRPOProgress",),
    "lightning_grpo.callbacks.trajectories": ("TrajectoryWriter",),
    "lightning_grpo.callbacks.weight_sync": ("WeightSync",),
    "lightning_grpo.datamodule": ("RolloutDataModule",),
    "lightning_grpo.evaluation": ("Evaluation",),
    "lightning_grpo.module": ("GRPOModule",),
    "lightning_grpo.objective": ("Objective",),
    "lightning_grpo.policy.load": ("load_policy", "load_tokenizer"),
    "lightning_grpo.policy.lora": ("LoRA",),
    "lightning_grpo.policy.packed": ("PackedPolicy",),
    "lightning_grpo.replay": ("ReplayDataModule",),
    "lightning_grpo.rollout.curriculum": ("Curriculum",),
    "lightning_grpo.rollout.limits": ("RolloutLimits",),
    "lightning_grpo.rollout.per_dataset": ("PerDatasetWorkflow",),
    "lightning_grpo.rollout.prompts": ("Prompts",),
    "lightning_grpo.rollout.protocols": ("EpisodeContext", "RolloutWorkflow"),
    "lightning_grpo.rollout.workflow": ("RLVRWorkflow",),
    "lightning_grpo.servers.embedded": ("EmbeddedServers",),
    "lightning_grpo.servers.running": ("RunningServers",),
    "lightning_grpo.servers.sglang": ("SGLangServers",),
    "lightning_grpo.servers.ray": ("RayServers",),
    "lightning_grpo.servers.slurm": ("SlurmServers",),
    "lightning_grpo.strategies.checkpoints": ("AtomicCheckpointIO",),
    "lightning_grpo.strategies.fsdp2": ("FSDP2Strategy",),
    "lightning_grpo.strategies.parallelize": ("parallelize",),
    "lightning_grpo.types": (
        "Completion",
        "Group",
        "Prompt",
        "Sampling",
        "Trajectory",
    ),
    "lightning_grpo.weights.disk": ("DiskTransport",),
    "lightning_grpo.weights.ipc": ("IPCTransport",),
    "lightning_grpo.weights.process_group": ("ProcessGroupTransport",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every public name, imported or not."""
    return sorted(__all__)


if TYPE_CHECKING:
    from lightning_grpo.agents.agent_workflow import AgentWorkflow as AgentWorkflow
    from lightning_grpo.agents.multi_turn import MultiTurnWorkflow as MultiTurnWorkflow
    from lightning_grpo.agents.tool_workflow import ToolWorkflow as ToolWorkflow
    from lightning_grpo.algorithm.advantages import GroupAdvantage as GroupAdvantage
    from lightning_grpo.algorithm.advantages import group_mean as group_mean
    from lightning_grpo.algorithm.corrections import TokenTIS as TokenTIS
    from lightning_grpo.algorithm.losses import GRPOLoss as GRPOLoss
    from lightning_grpo.callbacks.weight_sync import WeightSync as WeightSync
    from lightning_grpo.datamodule import RolloutDataModule as RolloutDataModule
    from lightning_grpo.module import GRPOModule as GRPOModule
    from lightning_grpo.replay import ReplayDataModule as ReplayDataModule
    from lightning_grpo.rollout.limits import RolloutLimits as RolloutLimits
    from lightning_grpo.rollout.prompts import Prompts as Prompts
    from lightning_grpo.rollout.workflow import RLVRWorkflow as RLVRWorkflow
    from lightning_grpo.servers.embedded import EmbeddedServers as EmbeddedServers
    from lightning_grpo.servers.ray import RayServers as RayServers
    from lightning_grpo.servers.running import RunningServers as RunningServers
    from lightning_grpo.servers.sglang import SGLangServers as SGLangServers
    from lightning_grpo.servers.slurm import SlurmServers as SlurmServers
    from lightning_grpo.strategies.fsdp2 import FSDP2Strategy as FSDP2Strategy
    from lightning_grpo.types import Group as Group
    from lightning_grpo.types import Prompt as Prompt
    from lightning_grpo.types import Sampling as Sampling
    from lightning_grpo.types import Trajectory as Trajectory
