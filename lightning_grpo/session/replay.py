"""ReplaySession: rollout batches as a run recorded them, in place of servers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.algorithm.metrics import rollout_metrics
from lightning_grpo.distributed import RankChannel
from lightning_grpo.errors import CheckpointError
from lightning_grpo.loader import Taken
from lightning_grpo.rollout.records import (
    RecordedBatch,
    read_batch,
    recorded_version,
    trajectory_files,
)
from lightning_grpo.session.session import Session


@dataclass(frozen=True)
class _Recording:
    """Files of one recording by the version that trained on them, in order; rank 0 only."""

    files: list[tuple[int, Path]]

    @classmethod
    def open(cls, path: Path) -> _Recording:
        found = [(recorded_version(file), file) for file in trajectory_files(path)]
        return cls(sorted(found, key=lambda each: each[0]))

    def left(self, version: int) -> list[Path]:
        """What is still to be trained on by weights of that version."""
        return [file for recorded, file in self.files if recorded >= version]


class ReplaySession(Session):
    """Recorded rollout batches, in the order in which they were trained on.

    Args:
        path: A `.parquet` file, a folder of them, or a run's folder.
        channel: To the other ranks.

    Attributes:
        num_batches: Recorded rollout batches.
    """

    def __init__(self, path: Path, channel: RankChannel) -> None:
        super().__init__(channel)
        self._path = path
        self._recording = channel.on_rank_zero(
            lambda: _Recording.open(path), what="opening the recording", deadline_s=600.0
        )
        files = self._recording.files if self._recording is not None else []
        self.num_batches = channel.broadcast(len(files))

    def num_left(self) -> int:
        """Recorded rollout batches that are still to come; on every rank."""
        left = self._recording.left(self.version) if self._recording is not None else []
        return self.channel.broadcast(len(left))

    @override
    def take(self) -> Taken:
        recorded = self.channel.on_rank_zero(
            self._read, what="a recorded rollout batch", deadline_s=600.0
        )
        scalars = None
        if recorded is not None:
            version = recorded.version
            batch = RolloutBatch.from_groups(recorded.groups, version, version)
            scalars = Taken(version, version, batch, rollout_metrics(batch), None)
        taken: Taken = self.channel.broadcast(scalars)
        self.version = taken.version
        return replace(taken, groups=recorded.groups if recorded is not None else None)

    @override
    def publish(self, policy: nn.Module, *, trained: bool) -> None:
        """Count the version; nobody is waiting for the weights."""
        self.version += int(trained)

    @override
    def state_dict(self, num_unpublished: int = 0) -> dict[str, Any]:
        """The version is all there is to go on from."""
        version = self.version + num_unpublished
        return {"version": version, "run_id": "replay", "producer": None}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind what a checkpoint was trained on, of a replay or of the recorded run."""
        self.version = int(state["version"])

    @override
    def describe(self) -> dict[str, str]:
        return {"replay": f"{self.num_batches} recorded rollout batches of {self._path}"}

    def _read(self) -> RecordedBatch:
        assert self._recording is not None
        left = self._recording.left(self.version)
        if not left:
            raise CheckpointError(
                f"the recording {str(self._path)!r} holds no rollout batch of version "
                f"{self.version} or later ({self.num_batches} in all)."
            )
        return read_batch(left[0])
