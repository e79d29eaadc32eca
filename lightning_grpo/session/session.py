"""The session of a run: what every rank sees of it, and what rank 0 does for all.

RolloutSession: rank 0's rollouts as every rank sees them. ReplaySession: what a run recorded, in
the place of servers.

Every method but `state_dict` and the properties is called on every rank, at the same point. Rank 0
does the work on its event loop; the others wait for its word (`RankChannel`), never in a
collective.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, distributed, nn
from typing_extensions import override

from lightning_grpo._compat_lightning import launched_processes
from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.algorithm.metrics import rollout_metrics
from lightning_grpo.distributed import RankChannel
from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.loader import WAITED, Taken
from lightning_grpo.naming import CheckpointNames
from lightning_grpo.rollout.records import (
    RecordedBatch,
    read_batch,
    recorded_version,
    trajectory_files,
)
from lightning_grpo.servers.base import main_address
from lightning_grpo.session.assembly import (
    Beginning,
    QuietHeap,
    current_gpu,
    release_shared_memory,
    serving_dtype,
    this_gpu,
)
from lightning_grpo.session.material import Material, SessionSettings, open_material
from lightning_grpo.session.process import place_rollouts
from lightning_grpo.session.proof import TrainerProof, is_adapted, packed, policy_scores
from lightning_grpo.session.rollouts import Publish, Rollouts
from lightning_grpo.types import Group, RolloutProgress, ServerActivity
from lightning_grpo.validation import EvaluationBatch, joined_groups, score_groups
from lightning_grpo.weights.gather import gather_weights, wire_bytes
from lightning_grpo.weights.proof import Scores, SentScores, promised
from lightning_grpo.weights.publisher import PublishReport, SyncSettings
from lightning_grpo.weights.transport import Snapshot

T = TypeVar("T")

SYNC_ENDS_S = 15.0
"""A weight sync may go on for so long once a signal came. It is quick, but where no server is left
it waits for one to come, and whoever takes the trainer's node away does not."""


class Session(ABC):
    """One run's rollouts as every rank sees them; by itself, of a run without servers.

    Args:
        channel: To the other ranks.

    Attributes:
        channel: The same.
        version: Weight version of the trainer: rollout batches trained on so far.
        num_prompts: Prompts of one pass.
        num_val_prompts: Held-out prompts by set.
        pinned: What a checkpoint's positions depend on: it must not change on the way.
        remaining_batches: Rollout batches that the trainer will still take; None: no limit known.
        sync: How weights travel.
    """

    def __init__(self, channel: RankChannel) -> None:
        self.channel = channel
        self.version = self.num_prompts = 0
        self.num_val_prompts: dict[str, int] = {}
        self.pinned: dict[str, Any] = {}
        self.remaining_batches: int | None = None
        self.sync = SyncSettings()

    def start(self) -> None:  # noqa: B027 - nothing takes long, by default
        """Begin what takes long, in the background."""

    def close(self) -> None:  # noqa: B027 - nothing was started, by default
        """End everything; from any state, any number of times."""

    @abstractmethod
    def take(self) -> Taken:
        """The next rollout batch: groups on rank 0, its scalars on every rank.

        Consumes what rank 0 has collected; every rank waits for it, by messages. Produces the same
        scalars everywhere. The loader goes on, on every rank at once.
        """

    def share(self, parts: list[Any] | None) -> Any:
        """Rank r's element of what rank 0 passes."""
        return self.channel.scatter(parts)

    def gather(self, value: T) -> list[T] | None:
        """What every rank passes, on rank 0; None elsewhere."""
        return self.channel.gather(value)

    @abstractmethod
    def publish(self, policy: nn.Module, *, trained: bool) -> PublishReport | None:
        """Bring the policy's weights to the servers and prove that they arrived.

        Args:
            policy: A `PackedPolicy`, sharded or not.
            trained: Whether a rollout batch was trained on since the last publish: a new version.
        """

    def release_memory(self) -> None:  # noqa: B027 - there are no servers, by default
        """Have the servers give their GPU memory back until the next publish."""

    def ask(self, name: str, first: int, last: int) -> None:
        """Start to answer held-out prompts `first` to `last` (exclusive)."""
        raise ConfigError("held-out prompts can't be answered in a replay: there are no servers.")

    def answer(self, name: str, first: int, last: int) -> EvaluationBatch:
        """Wait for prompts that were asked; the scores reach every rank."""
        raise ConfigError("held-out prompts can't be answered in a replay: there are no servers.")

    @abstractmethod
    def state_dict(self, num_unpublished: int = 0) -> dict[str, Any]:
        """Everything to go on from, as plain data; only rank 0 has the producer's part.

        Also after the end, for a checkpoint that is saved then.

        Args:
            num_unpublished: Batches trained on whose weights are not on the servers yet.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; before `start`."""

    def progress(self) -> RolloutProgress | None:
        """How far the next rollout batch is, if that is known here; from any thread."""
        return None

    def health(self) -> dict[str, float]:
        """`health/...` of rank 0; empty elsewhere."""
        return {}

    def server_activities(self, *, ongoing: bool = False) -> list[ServerActivity]:
        """What each server has done since the last call; rank 0 only, empty elsewhere.

        Args:
            ongoing: Whether what it does now is added, as far as it has lasted.
        """
        return []

    def dtypes(self) -> dict[str, str]:
        """Of the weights on the wire and in the servers, where there are any; rank 0 only."""
        return {}

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start."""


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


@dataclass
class _Lead:
    """What only rank 0 has."""

    material: Material
    rollouts: Rollouts
    started: Future[None] | None = None
    proof: TrainerProof | None = None
    names: CheckpointNames | None = None


class RolloutSession(Session):
    """The rollouts of one run, on servers.

    Args:
        settings: What to run.
        channel: To the other ranks.

    Attributes:
        run_id: Names this run's weights on the servers.
        report: The last publish's report; rank 0 only.
    """

    def __init__(self, settings: SessionSettings, channel: RankChannel) -> None:
        super().__init__(channel)
        self.settings = settings
        self.run_id = uuid.uuid4().hex[:8]
        self.report: PublishReport | None = None
        self._synced = False
        self._waited_s = 0.0  # in the last publish, while no server was left
        self._heap = QuietHeap()
        self._restored: dict[str, Any] | None = None
        self._answers: dict[tuple[str, int], list[Future[list[Group]]]] = {}
        material = channel.on_rank_zero(
            lambda: open_material(settings), what="opening the prompts", deadline_s=3600.0
        )
        self._lead = None
        if material is not None:
            self._lead = _Lead(material, place_rollouts(settings, material))
        sizes = None
        if material is not None:
            held_out = {name: len(rows) for name, rows in material.val_prompts.items()}
            sizes = (material.num_prompts, held_out, material.fingerprint)
        self.num_prompts, self.num_val_prompts, fingerprint = channel.broadcast(sizes)
        self.pinned = {
            "batch_size": settings.batch_size,
            "group_size": settings.group_size,
            **settings.order,
            "prompts": fingerprint,
        }

    # -- start and end --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the servers in the background (rank 0); rollouts begin at `wait_started`."""
        lead = self._lead
        if lead is not None and lead.started is None:
            lead.started = lead.rollouts.start()

    def wait_started(self) -> None:
        """Wait until the servers answer, then let rollouts begin.

        Raises:
            ServerStartError: One doesn't; with the end of its log.
        """
        lead = self._lead
        if lead is not None:
            remaining, gpu = self.remaining_batches, current_gpu()
            known = (self.run_id, self._restored, remaining, self.sync, lead.material.probe, gpu)
            lead.rollouts.begin(Beginning(*known))
        self.channel.wait(lead.started if lead else None, what="the start of the servers")
        if lead is not None and lead.proof is None and self.sync.verify:
            serving = lead.rollouts.serving()
            assert serving is not None
            lead.proof = TrainerProof(lead.material.probe, serving.precisions)
        self._heap.freeze()

    @override
    def close(self) -> None:
        self._heap.thaw()
        if self._lead is not None:
            self._lead.rollouts.close()
            release_shared_memory()

    # -- rollouts -------------------------------------------------------------------------------

    @override
    def take(self) -> Taken:
        if not self._synced:
            raise ConfigError(
                "weights must be published before the first rollout batch. Keep WeightSync among "
                "the callbacks (an own `configure_callbacks` adds to `super()`'s), or call "
                "`data.publish(policy, trained=False)` in a program without a Trainer."
            )
        self._emit("fetch", version=self.version)
        lead = self._lead
        future = lead.rollouts.take(self.version) if lead else None
        taken = self.channel.wait(future, what="rollouts")
        if taken is not None:
            taken.metrics[WAITED] = self._waited_s
        scalars: Taken = self.channel.broadcast(taken and replace(taken, groups=None))
        return taken or scalars

    # -- weights --------------------------------------------------------------------------------

    @override
    def publish(self, policy: nn.Module, *, trained: bool) -> PublishReport | None:
        with torch.inference_mode(False), torch.no_grad():
            return self._publish(policy, trained)

    def _publish(self, policy: nn.Module, trained: bool) -> PublishReport | None:
        # Never under `validate`'s inference mode: FSDP keeps what it gathers, and could not train
        # on it, nor gather again.
        self.wait_started()
        if not trained and self._synced:
            return None
        version = self.version + int(trained)
        # Servers that somebody else started may hold weights of another run, so close to these
        # that they would pass for rounding.
        ours = self.settings.servers.can_restart
        if ours and not trained and version == 0 and self.sync.verify and self._adopt(policy):
            self._finish_publish(version)
            return None
        if self.sync.release_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the step cached is the servers' again
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the optimizer: servers work on until it is done
        snapshot: Future[Snapshot] = Future()
        sent: Future[SentScores] = Future()
        turn: Future[None] = Future()
        lead = self._lead
        future_report = None
        if lead is not None:
            expected = wire_bytes(policy, serving_dtype())
            wanted = Publish(version, expected, snapshot, sent, turn)
            future_report = lead.rollouts.publish(wanted)
        with promised(snapshot, sent):
            self.channel.wait(
                turn if lead else None, what="the servers' last update", stop_after_s=SYNC_ENDS_S
            )
            weights = self._gather(policy)  # while the servers stop
            snapshot.set_result(self._as_checkpoint(policy, weights))
            if lead is not None and lead.proof is not None:
                sent.set_result(lead.proof.score(policy, weights))  # while the weights travel
        # Afterwards requests are sent again, and this pass would wait for the interpreter at each
        # kernel. Of several ranks it has collectives, which must not meet the update's.
        alone = self.channel.world_size == 1
        scored = self._policy_scores(policy) if alone else None
        self.report = self.channel.wait(
            future_report, what=f"the weight sync of version {version}", stop_after_s=SYNC_ENDS_S
        )
        if self.report is not None:
            self._waited_s = self.report.waited_s if trained else 0.0
        self._finish_publish(version)
        self._check_policy(policy, version, sent, scored or self._policy_scores(policy))
        return self.report

    def _adopt(self, policy: nn.Module) -> bool:
        """Whether the servers hold the weights of version 0 already, from the model's folder."""
        lead, adopted = self._lead, None
        weights = self._gather(policy)
        sent: Future[SentScores] = Future()
        if lead is not None and lead.proof is not None:
            sent.set_result(lead.proof.score(policy, weights))
            adopted = lead.rollouts.adopt(0, sent.result())
        done = self.channel.wait(adopted, what="the first probe of the servers")
        if not self.channel.broadcast(done):
            return False
        self._check_policy(policy, 0, sent, self._policy_scores(policy))
        return True

    def _gather(self, policy: nn.Module) -> Mapping[str, Tensor]:
        lead = self._lead
        memory = lead.proof.memory if lead is not None and lead.proof is not None else None
        return gather_weights(
            policy, serving_dtype(), this_gpu(), keep=lead is not None, into=memory
        )

    def _as_checkpoint(self, policy: nn.Module, weights: Mapping[str, Tensor]) -> Snapshot:
        """The same memory as servers read it; the proof scores it as the policy holds it."""
        lead = self._lead
        if lead is None:
            return weights
        if lead.names is None:
            lead.names = CheckpointNames(packed(policy).model)
        return lead.names.of(weights)

    def _policy_scores(self, policy: nn.Module) -> tuple[Scores, str] | None:
        """What the policy itself gives the probe, and the precision it computes in."""
        if not self.sync.verify:
            return None
        lead = self._lead
        sequences = self.channel.broadcast(lead.material.probe.sequences if lead else None)
        return policy_scores(policy, sequences)

    def _check_policy(
        self,
        policy: nn.Module,
        version: int,
        sent: Future[SentScores],
        scored: tuple[Scores, str] | None,
    ) -> None:
        """Prove that what was sent is what trains."""
        if scored is None:
            return
        lead = self._lead
        scores, kind = scored

        def check() -> None:
            assert lead is not None
            assert lead.proof is not None
            diff = lead.proof.check_policy(version, sent.result(), scores, kind, is_adapted(policy))
            if self.report is not None:
                self.report.sent_diff = diff

        self.channel.on_rank_zero(check, what="the proof of what was sent")

    @override
    def release_memory(self) -> None:
        lead = self._lead
        future = lead.rollouts.release_memory() if lead else None
        self.channel.wait(future, what="the release of the servers' memory")

    def _emit(self, name: str, **data: Any) -> None:
        if self.settings.on_event is not None:
            self.settings.on_event(name, **data)

    def _finish_publish(self, version: int) -> None:
        self._emit("sync", version=version)
        self.version = version
        self._synced = True
        if self._lead is not None:
            self._lead.rollouts.advance(version)

    # -- evaluation -----------------------------------------------------------------------------

    @override
    def ask(self, name: str, first: int, last: int) -> None:
        if self._lead is None:
            return
        evaluation, evaluate = self.settings.evaluation, self._lead.rollouts.evaluate
        kinds = [False] * evaluation.sampled + [True] * evaluation.greedy
        self._answers[name, first] = [evaluate(name, first, last, greedy=kind) for kind in kinds]

    @override
    def answer(self, name: str, first: int, last: int) -> EvaluationBatch:
        evaluation = self.settings.evaluation
        parts = self._answers.pop((name, first), [])
        groups: list[list[Group]] = []
        for k in range(int(evaluation.sampled) + int(evaluation.greedy)):
            future = parts[k] if parts else None
            answered = self.channel.wait(future, what=f"validation, prompts {first} to {last}")
            groups.append(answered or [])
        scores = None
        if self._lead is not None:
            sampled = groups[0] if evaluation.sampled else None
            greedy = groups[-1] if evaluation.greedy else None
            scores = score_groups(sampled, greedy, evaluation)
        scores = self.channel.broadcast(scores)
        return EvaluationBatch(
            name, scores.sampled, scores.greedy, joined_groups(groups), scores.majority
        )

    # -- checkpoints ----------------------------------------------------------------------------

    @override
    def state_dict(self, num_unpublished: int = 0) -> dict[str, Any]:
        found = self._lead and self._lead.rollouts.state_dict(num_unpublished)
        producer = self._restored if found is None else found
        version = self.version + num_unpublished
        return {"version": version, "run_id": self.run_id, "producer": producer}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version = int(state["version"])
        self.run_id = str(state["run_id"])
        self._restored = state["producer"]

    def progress(self) -> RolloutProgress | None:
        """How far the next rollout batch is; rank 0 only, from any thread."""
        return None if self._lead is None else self._lead.rollouts.progress()

    def health(self) -> dict[str, float]:
        """How late the event loop was; rank 0 only, empty elsewhere."""
        lag_s = None if self._lead is None else self._lead.rollouts.lag_s()
        return {} if lag_s is None else {"health/event_loop_lag_s": lag_s}

    def server_activities(self, *, ongoing: bool = False) -> list[ServerActivity]:
        """What each server has done since the last call; rank 0 only, empty elsewhere."""
        lead = self._lead
        return [] if lead is None else lead.rollouts.server_activities(ongoing=ongoing)

    def dtypes(self) -> dict[str, str]:
        """Of the weights on the wire and in the servers; rank 0 only."""
        serving = None if self._lead is None else self._lead.rollouts.serving()
        if serving is None:
            return {}
        wire = str(serving_dtype() or torch.float32).removeprefix("torch.")
        return {"wire": wire, "server": ", ".join(sorted(serving.dtypes))}

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start; rank 0 only."""
        lead, servers = self._lead, self.settings.servers
        return {"servers": servers.describe() if lead is None else lead.rollouts.describe_servers()}


def open_session(settings: SessionSettings, channel: RankChannel) -> RolloutSession:
    """Open the prompts and so on; the ranks' channel is closed where that is refused."""
    try:
        return RolloutSession(settings, channel)
    except BaseException:
        channel.close()
        raise


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
        self._reader = ThreadPoolExecutor(1, "recording")
        self._ahead: tuple[Path, Future[RecordedBatch]] | None = None
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
        file, ahead = self._ahead or (None, None)
        batch = ahead.result() if ahead is not None and file == left[0] else read_batch(left[0])
        self._ahead = None
        if len(left) > 1:  # while this one is trained on
            self._ahead = left[1], self._reader.submit(read_batch, left[1])
        return batch

    @override
    def close(self) -> None:
        self._reader.shutdown()
