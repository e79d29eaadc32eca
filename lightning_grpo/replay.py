"""ReplayDataModule: train from trajectories that a run has written, without servers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L

from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.distributed import RankChannel
from lightning_grpo.loader import RolloutLoader
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.protocols import RolloutWorkflow
from lightning_grpo.servers.base import Servers
from lightning_grpo.session.replay import ReplaySession


class ReplayDataModule(RolloutDataModule):
    """The rollout batches that a run consumed, as it consumed them: same batches, same losses.

    Takes RolloutDataModule's arguments too, so that a run's own config works; only
    `minibatches_per_batch` and `passes_per_batch` matter. There is no validation: nobody answers.
    Training ends with the recording, or earlier by the Trainer's limits.

    Args:
        trajectories: A run's folder, its `trajectories/`, or one `.parquet` file.
        prompts: Not used.
        workflow: Not used.
        servers: Not used.
        settings: RolloutDataModule's other arguments.
    """

    _asks = False

    def __init__(
        self,
        trajectories: str,
        prompts: Prompts | None = None,
        workflow: RolloutWorkflow | None = None,
        servers: Servers | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            cast("Prompts", prompts),
            cast("RolloutWorkflow", workflow),
            cast("Servers", servers),
            **settings,
        )
        self.trajectories = trajectories
        self.val_prompts = self.test_prompts = {}

    def train_dataloader(self) -> RolloutLoader:
        """Minibatches of the recording; the Trainer stops where it ends."""
        trainer = self._attached
        # A checkpoint of the run itself holds the state of another class of data module, which
        # Lightning does not hand to this one; how many batches were trained on says it all.
        done = trainer.global_step // self.steps_per_rollout
        self._replay.version = max(self._replay.version, done)
        loader = super().train_dataloader()
        end = trainer.global_step + self._replay.num_left() * self.steps_per_rollout
        if not 0 < trainer.max_steps < end:
            trainer.fit_loop.epoch_loop.max_steps = end
        return loader

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Any will do: how many steps were taken says where to go on."""

    def describe(self) -> dict[str, str]:
        """What is replayed: lines for the summary at the start."""
        return self._replay.describe()

    def _make_session(self, trainer: L.Trainer, channel: RankChannel) -> ReplaySession:
        return ReplaySession(Path(self.trajectories), channel)

    @property
    def _replay(self) -> ReplaySession:
        assert isinstance(self.session, ReplaySession)
        return self.session

    def _epoch_batches(self, num_prompts: int) -> int:
        # Longer than any recording: where an epoch of the recorded run ended is not known, and
        # `max_steps` ends the replay.
        return 10**9
