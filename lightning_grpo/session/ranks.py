"""The channel between the ranks of a run, whoever started them."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import distributed

from lightning_grpo._compat import launched_processes
from lightning_grpo.distributed import RankChannel
from lightning_grpo.servers.environment import main_address


def connect_ranks(trainer: L.Trainer | None, rank_timeout_s: float) -> RankChannel:
    """Join the other ranks; a collective where there are any.

    Args:
        trainer: The Trainer, or None in a program of its own (Fabric), whose process group tells.
        rank_timeout_s: Silence after which a rank counts as lost.
    """
    if trainer is None:
        return _without_trainer(rank_timeout_s)
    if trainer.world_size == 1:
        return RankChannel.single()
    strategy: Any = trainer.strategy
    channel = RankChannel.connect(
        trainer.global_rank,
        trainer.world_size,
        host=strategy.cluster_environment.main_address,
        rank_timeout_s=rank_timeout_s,
    )
    channel.watch_processes(launched_processes(trainer))
    channel.start_watchdog()
    return channel


def _without_trainer(rank_timeout_s: float) -> RankChannel:
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return RankChannel.single()
    channel = RankChannel.connect(
        distributed.get_rank(),
        distributed.get_world_size(),
        host=main_address(),
        rank_timeout_s=rank_timeout_s,
    )
    channel.start_watchdog()
    return channel
