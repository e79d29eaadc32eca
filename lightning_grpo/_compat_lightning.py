"""Every private import of Lightning, and of torch for its strategies, in one place.

Seen with lightning 2.6.6 and torch 2.13.0. A new release of either is checked here first.

| name | where | seen in |
|---|---|---|
| `_given_hyperparameters` | lightning.pytorch.core.mixins.hparams_mixin | lightning 2.6.6 |
| `_destroy_dist_connection` | lightning.fabric.utilities.distributed | lightning 2.6.6 |
| `_get_process_group_backend` | lightning ... ModelParallelStrategy | lightning 2.6.6 |
| `_optimizers_to_device` | lightning.fabric.utilities.optimizer | lightning 2.6.6 |
| `_checkpoint_connector.hpc_save_path` | lightning.pytorch.trainer.Trainer | lightning 2.6.6 |
| `_results` | lightning.pytorch.Trainer | lightning 2.6.6 |
| `_logger_connector.update_train_step_metrics` | lightning.pytorch.Trainer | lightning 2.6.6 |
| `_accelerator_connector.cluster_environment` | lightning.pytorch.Trainer | lightning 2.6.6 |
| `_last_global_step_saved` | lightning.pytorch.callbacks.ModelCheckpoint | lightning 2.6.6 |
| `_start_method` | launchers of lightning.pytorch that fork or spawn | lightning 2.6.6 |
| `_data_parallel_size` | lightning.pytorch.strategies.ModelParallelStrategy | lightning 2.6.6 |
| `_compiler_ctx` | lightning.pytorch.LightningModule | lightning 2.6.6 |
| `_EmptyStateDictLoadPlanner`, `_load_state_dict` | torch.distributed.checkpoint | torch 2.13.0 |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from subprocess import Popen
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.storage import StorageReader

SelfDescribedLoadPlanner = _EmptyStateDictLoadPlanner
"""Takes what is to be loaded from the checkpoint's own index."""


def given_hyperparameters() -> Mapping[str, Any] | None:
    """What LightningCLI is building the module from, as it stands in the config."""
    given: Mapping[str, Any] | None = _given_hyperparameters.get()
    return given


def is_compiled(module: LightningModule) -> bool:
    """Whether a Trainer was given `torch.compile(module)`, which it has unwrapped."""
    return module._compiler_ctx is not None


def destroy_dist_connection() -> None:
    """Leave the default process group at the end of the program, whatever signals come."""
    _destroy_dist_connection()


def optimizers_to_device(optimizers: Iterable[torch.optim.Optimizer], device: torch.device) -> None:
    """Move the optimizers' state."""
    _optimizers_to_device(optimizers, device)


def hpc_checkpoint_path(trainer: Trainer) -> str:
    """Where Lightning looks for a requeued job's checkpoint by itself (the next free number)."""
    path: str = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
    return path


def log_step(trainer: Trainer) -> None:
    """Hand this step's metrics to the loggers, as Lightning does after the callbacks."""
    trainer._logger_connector.update_train_step_metrics()


def log_values(
    module: LightningModule, metrics: Mapping[str, float], gone: Iterable[str] = ()
) -> None:
    """Log a step's numbers by `log_dict`, at a fifth of its cost.

    Lightning walks through all that it holds of a metric to move it to its value's device, each
    time it is logged. A value that is of its step alone has nothing to move. They stay in host
    memory, where loggers read them without a wait for the GPU.

    Args:
        module: In training.
        metrics: Of this step.
        gone: Metrics that this step has no value for; Lightning would log the last one again.
    """
    _forget(module.trainer, gone)
    module.log_dict({name: torch.tensor(float(value)) for name, value in metrics.items()})
    for metric in (module.trainer._results or {}).values():
        if not metric.meta.on_epoch:
            vars(metric).setdefault("to", _stay)


def _stay(*place: Any) -> None:
    """In place of a metric's `to`."""


def _forget(trainer: Trainer, names: Iterable[str]) -> None:
    connector = trainer._logger_connector
    for name in names:
        if trainer._results is not None:
            for hook in ("on_before_optimizer_step", "on_train_batch_end"):
                trainer._results.pop(f"{hook}.{name}", None)
        for seen in (
            connector._logged_metrics,
            connector._callback_metrics,
            connector._progress_bar_metrics,
        ):
            seen.pop(name, None)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """Where the ranks come from; the strategy of one device does not keep it."""
    return trainer._accelerator_connector.cluster_environment


def last_saved_step(callback: ModelCheckpoint) -> int:
    """The global step of the newest checkpoint that a ModelCheckpoint wrote; 0 before the first."""
    return callback._last_global_step_saved


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Override Lightning's "auto", which would be tensor parallelism within the node."""
    strategy._data_parallel_size = size


def launched_processes(trainer: Trainer) -> dict[int, Popen[bytes]]:
    """The ranks that Lightning's own launcher started from this process, by global rank."""
    launcher = trainer.strategy.launcher
    processes = vars(launcher).get("procs", []) if launcher is not None else []
    return {trainer.global_rank + i: process for i, process in enumerate(processes, start=1)}


def start_method(trainer: Trainer) -> str | None:
    """`fork` or `spawn` where ranks are children that share this program; None elsewhere."""
    launcher = trainer.strategy.launcher
    return vars(launcher).get("_start_method") if launcher is not None else None


def load_whole_state(reader: StorageReader, planner: SelfDescribedLoadPlanner) -> dict[str, Any]:
    """All that a sharded checkpoint holds, by what its index says, as torch's own joining does."""
    state: dict[str, Any] = {}
    _load_state_dict(state, reader, planner=planner, no_dist=True)
    return state
