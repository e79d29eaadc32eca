"""GRPO post-training of language models for people who know Lightning.

The loop, which runs while `Trainer.fit` does what it always does:

    prompts -> producer -> workflow -> server pool -> SGLang or the embedded engine
                  |            |
                 gate       rewards           (rank 0, one event loop)
                  v
    finished groups -> take(B) -> advantages -> each rank's share -> minibatches
    minibatch -> packed micro-batches -> loss -> one optimizer step
    last minibatch of the batch -> WeightSync -> servers, verified -> gate.advance(version)

Names are resolved on first use, so that importing the package imports neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import TYPE_CHECKING, Any

from lightning_grpo.moved import serve_old_paths

__version__ = "0.2.0"

serve_old_paths()

# The one list of public names is that of the imports below, for type checkers. Here they are read
# and not run, which would take seconds.
_SOURCE = pkgutil.get_data(__name__, "__init__.py") or b""  # also where the package is in a zip
_LISTED = re.findall(r"^    from (\S+) import (\w+) as", _SOURCE.decode(), re.M)
_MODULE_OF = {name: module for module, name in _LISTED}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __dir__() -> list[str]:
    """Every public name, imported or not."""
    return sorted(__all__)


if TYPE_CHECKING:
    from lightning_grpo.agents.tools import ToolLimits as ToolLimits
    from lightning_grpo.agents.turns import EpisodeRecord as EpisodeRecord
    from lightning_grpo.agents.turns import next_ids as next_ids
    from lightning_grpo.agents.workflows import AgentWorkflow as AgentWorkflow
    from lightning_grpo.agents.workflows import MultiTurnWorkflow as MultiTurnWorkflow
    from lightning_grpo.agents.workflows import ToolWorkflow as ToolWorkflow
    from lightning_grpo.algorithm.advantages import GroupAdvantage as GroupAdvantage
    from lightning_grpo.algorithm.advantages import LeaveOneOutAdvantage as LeaveOneOutAdvantage
    from lightning_grpo.algorithm.advantages import ReinforceAdvantage as ReinforceAdvantage
    from lightning_grpo.algorithm.advantages import Truncation as Truncation
    from lightning_grpo.algorithm.advantages import group_mean as group_mean
    from lightning_grpo.algorithm.advantages import group_std as group_std
    from lightning_grpo.algorithm.batch import MicroBatch as MicroBatch
    from lightning_grpo.algorithm.batch import RolloutBatch as RolloutBatch
    from lightning_grpo.algorithm.corrections import OPSM as OPSM
    from lightning_grpo.algorithm.corrections import GeometricMask as GeometricMask
    from lightning_grpo.algorithm.corrections import IcePop as IcePop
    from lightning_grpo.algorithm.corrections import SequenceTIS as SequenceTIS
    from lightning_grpo.algorithm.corrections import TokenTIS as TokenTIS
    from lightning_grpo.algorithm.losses import K1 as K1
    from lightning_grpo.algorithm.losses import K2 as K2
    from lightning_grpo.algorithm.losses import K3 as K3
    from lightning_grpo.algorithm.losses import CappedCISPOLoss as CappedCISPOLoss
    from lightning_grpo.algorithm.losses import CISPOLoss as CISPOLoss
    from lightning_grpo.algorithm.losses import ConstantLength as ConstantLength
    from lightning_grpo.algorithm.losses import DPPOLoss as DPPOLoss
    from lightning_grpo.algorithm.losses import GRPOLoss as GRPOLoss
    from lightning_grpo.algorithm.losses import GSPOLoss as GSPOLoss
    from lightning_grpo.algorithm.losses import KLPenalty as KLPenalty
    from lightning_grpo.algorithm.losses import M2POLoss as M2POLoss
    from lightning_grpo.algorithm.losses import PolicyLoss as PolicyLoss
    from lightning_grpo.algorithm.losses import SAPOLoss as SAPOLoss
    from lightning_grpo.algorithm.losses import SequenceMean as SequenceMean
    from lightning_grpo.algorithm.losses import TokenMean as TokenMean
    from lightning_grpo.algorithm.losses import WeightedK3 as WeightedK3
    from lightning_grpo.algorithm.metrics import Max as Max
    from lightning_grpo.algorithm.metrics import Mean as Mean
    from lightning_grpo.algorithm.metrics import Sum as Sum
    from lightning_grpo.callbacks.health import HealthMonitor as HealthMonitor
    from lightning_grpo.callbacks.recording import SampleTables as SampleTables
    from lightning_grpo.callbacks.recording import TimelineWriter as TimelineWriter
    from lightning_grpo.callbacks.recording import TrajectoryWriter as TrajectoryWriter
    from lightning_grpo.callbacks.screen import GRPOProgress as GRPOProgress
    from lightning_grpo.callbacks.weight_sync import WeightSync as WeightSync
    from lightning_grpo.datamodule import ReplayDataModule as ReplayDataModule
    from lightning_grpo.datamodule import RolloutDataModule as RolloutDataModule
    from lightning_grpo.module import GRPOModule as GRPOModule
    from lightning_grpo.objective import Objective as Objective
    from lightning_grpo.objective import minibatch_loss as minibatch_loss
    from lightning_grpo.policy.load import load_policy as load_policy
    from lightning_grpo.policy.load import load_tokenizer as load_tokenizer
    from lightning_grpo.policy.lora import LoRA as LoRA
    from lightning_grpo.policy.packed import PackedPolicy as PackedPolicy
    from lightning_grpo.rollout.admission import Curriculum as Curriculum
    from lightning_grpo.rollout.ledger import RolloutLimits as RolloutLimits
    from lightning_grpo.rollout.prompts import Prompts as Prompts
    from lightning_grpo.rollout.workflow import EpisodeContext as EpisodeContext
    from lightning_grpo.rollout.workflow import PerDatasetWorkflow as PerDatasetWorkflow
    from lightning_grpo.rollout.workflow import RLVRWorkflow as RLVRWorkflow
    from lightning_grpo.rollout.workflow import RolloutWorkflow as RolloutWorkflow
    from lightning_grpo.servers.base import RunningServers as RunningServers
    from lightning_grpo.servers.base import ServerList as ServerList
    from lightning_grpo.servers.other_nodes import RayServers as RayServers
    from lightning_grpo.servers.other_nodes import SlurmServers as SlurmServers
    from lightning_grpo.servers.process import EmbeddedServers as EmbeddedServers
    from lightning_grpo.servers.sglang import SGLangServers as SGLangServers
    from lightning_grpo.strategies.checkpoints import AtomicCheckpointIO as AtomicCheckpointIO
    from lightning_grpo.strategies.fsdp2 import FSDP2Strategy as FSDP2Strategy
    from lightning_grpo.strategies.fsdp2 import parallelize as parallelize
    from lightning_grpo.types import Completion as Completion
    from lightning_grpo.types import Group as Group
    from lightning_grpo.types import Prompt as Prompt
    from lightning_grpo.types import Sampling as Sampling
    from lightning_grpo.types import Trajectory as Trajectory
    from lightning_grpo.validation import Evaluation as Evaluation
    from lightning_grpo.weights.process_group import IPCTransport as IPCTransport
    from lightning_grpo.weights.process_group import ProcessGroupTransport as ProcessGroupTransport
    from lightning_grpo.weights.transport import DiskTransport as DiskTransport
else:

    def __getattr__(name: str) -> Any:
        """Import the module that holds a public name when it is first asked for."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
