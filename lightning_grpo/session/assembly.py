"""Rank 0 puts a live run together: pool, producer, publisher and their state."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import anyio
import anyio.to_thread
import torch

from lightning_grpo._compat import freeze_heap, is_heap_frozen
from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.algorithm.metrics import rollout_metrics
from lightning_grpo.errors import ConfigError, RolloutError
from lightning_grpo.loader import Taken
from lightning_grpo.rollout.admission import Policy, PromptMixture, StalenessGate
from lightning_grpo.rollout.episodes import EpisodeRunner
from lightning_grpo.rollout.ledger import LOGGED, Ledger, raise_file_limit, room_for_connections
from lightning_grpo.rollout.producer import RolloutProducer
from lightning_grpo.rollout.scoring import RewardScorer
from lightning_grpo.servers.base import Servers
from lightning_grpo.serving.health import (
    HealthPolicy,
    check_joins,
    check_memory_release,
    choose_interruption,
)
from lightning_grpo.serving.pool import Listing, PoolLimits, ServerPool
from lightning_grpo.serving.server import Member, MemberState, ServerHandle
from lightning_grpo.session.material import Material, SessionSettings
from lightning_grpo.weights.process_group import (
    DirectTransport,
    IPCTransport,
    ProcessGroupTransport,
)
from lightning_grpo.weights.proof import Probe
from lightning_grpo.weights.publisher import SyncSettings, WeightPublisher
from lightning_grpo.weights.transport import DiskTransport, Place, Transport


def serving_dtype() -> torch.dtype | None:
    """Servers on GPUs compute in bf16, so no more than that travels; on CPUs in fp32."""
    return torch.bfloat16 if torch.cuda.is_available() else None


def this_gpu() -> torch.device | None:
    """Where weights leave from, also those that are kept in host memory."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def current_gpu() -> int | None:
    """This rank's GPU, as torch numbers them."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def release_shared_memory() -> None:
    """Free what servers on this GPU had mapped; torch would complain of it when it ends."""
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()


SHARE = 0.02
"""Of the time may go into looks at the whole heap."""
OLDEST = 2
"""The generation that holds what lives long."""
NOT_NOW = 1 << 30


class QuietHeap:
    """Spares the collector what stands when training starts, for it stays until the end.

    That is half a million objects. To look through them again and again took two fifths of the
    rollout client's time beside a server that answers at once (70 to 42 ms for 128 samples), and
    each look stops the trainer's thread as well. Ten thousand requests in flight are a million
    objects more, of which a look finds hardly any to be garbage: so looks at all of them are made
    as seldom as they are slow. A heap that a program has frozen itself stays as that left it.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._frozen = self._thaws = False
        self._thresholds = gc.get_threshold()
        self._began = self._next = 0.0

    def freeze(self) -> None:
        """Collect what is garbage by now, and leave the rest alone from here on; once."""
        if not self._frozen:
            if not is_heap_frozen():
                freeze_heap()
                self._thaws = True
            self._thresholds = gc.get_threshold()
            gc.callbacks.append(self.space_out)
            self._frozen = True

    def thaw(self) -> None:
        """Let the collector see everything again."""
        if self._frozen:
            gc.callbacks.remove(self.space_out)
            gc.set_threshold(*self._thresholds)
            if self._thaws:
                gc.unfreeze()
            self._frozen = self._thaws = False

    def space_out(self, phase: str, info: Mapping[str, Any]) -> None:
        """For `gc.callbacks`: the slower the last look at all was, the later the next."""
        now = self._clock()
        if phase == "start":
            self._began = now
        elif info["generation"] == OLDEST:
            self._next = now + (now - self._began) / SHARE
            young, middle, _ = self._thresholds
            gc.set_threshold(young, middle, NOT_NOW)
        elif now >= self._next:
            gc.set_threshold(*self._thresholds)


class Located(Protocol):
    """A server with the GPUs that it uses."""

    @property
    def devices(self) -> tuple[int, ...]:
        """GPUs; empty where unknown or none."""
        ...


class Started(Protocol):
    """Servers that answer."""

    @property
    def handles(self) -> Sequence[Located]:
        """One for each server."""
        ...


def choose_transport(
    given: Transport | None, servers: Started, trainer_gpu: int | None, *, on_cpu: bool = False
) -> Transport:
    """The given transport, else one by what is there.

    Where either side computes on CPUs a gloo group. On GPUs an NCCL group, unless a server is on
    the trainer's own GPU, since NCCL refuses two ranks on one device: if that is the only one the
    server maps the trainer's memory, else weights go by disk. Where a server's GPU is not known,
    the group's first bucket tells.

    Args:
        given: The user's choice.
        servers: Started.
        trainer_gpu: Rank 0's, numbered as the servers' are; None: it computes on the CPU.
        on_cpu: Whether a server computes on a CPU.
    """
    if given is not None:
        return given
    if trainer_gpu is None or on_cpu:
        return ProcessGroupTransport("gloo")
    serving = {device for handle in servers.handles for device in handle.devices}
    if serving == {trainer_gpu}:
        return IPCTransport()
    return DiskTransport() if trainer_gpu in serving else DirectTransport()


_TRIAL_S = 10.0
"""What a reward may take at its trial; a slower one says nothing by it."""


@dataclass
class Live:
    """The parts, from start to close.

    Attributes:
        pool: The servers as one.
        publisher: Brings them new weights.
        producer: Groups for training, and evaluation.
    """

    pool: ServerPool
    publisher: WeightPublisher
    producer: RolloutProducer
    _counted: dict[str, int] = field(default_factory=dict)
    _counted_at: float = field(default_factory=time.monotonic)
    _idle_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin to count."""
        self._idle_s = {m.slot: m.idle_s for m in self.pool.members}

    async def take(self, version: int) -> Taken:
        """The next rollout batch, for a trainer that is at `version`.

        Consumes the producer's groups; waits in its `take`. Produces them with their scalars as
        tensors and what was counted since the last batch. `RolloutSession.take` goes on, on every
        rank.
        """
        gate = self.producer.gate
        if gate.num_pending_batches > gate.max_staleness:  # no group may start, for ever
            raise RolloutError(
                f"the weights of the last {gate.num_pending_batches} rollout batches were not"
                f" published, which `max_staleness` {gate.max_staleness} doesn't allow. After the"
                " last step on each, a subclass of WeightSync must call"
                " `super().on_train_batch_end`, a program without a Trainer"
                " `data.publish(policy)`."
            )
        groups = await self.producer.take()
        index, counted = gate.num_taken // gate.batch_size - 1, self.count()
        # In a thread: millions of tokens would hold the loop, and with it the requests in flight.
        batch = await anyio.to_thread.run_sync(RolloutBatch.from_groups, groups, version, index)
        return Taken(index, version, batch, rollout_metrics(batch) | counted, groups)

    def count(self) -> dict[str, float]:
        """`rollout/...`, `staleness/dropped_...`, `idle/...`: what happened since the last call."""
        now, counted = time.monotonic(), self.producer.counters.state_dict()
        since = {name: n - self._counted.get(name, 0) for name, n in counted.items()}
        period = max(now - self._counted_at, 1e-9)
        self._counted, self._counted_at = counted, now
        logged = {name: float(since[counter]) for name, counter in LOGGED.items()}
        logged["rollout/pass"] = float(self.producer.pass_index)
        logged["rollout/queued"] = float(self.producer.gate.num_finished)
        logged["rollout/in_flight"] = float(self.pool.num_in_flight)
        logged["rollout/tokens_per_s"] = since["tokens"] / period
        logged["rollout/groups_per_s"] = since["taken"] / period
        members, before = self.pool.members, self._idle_s
        serve = (MemberState.CLEAN, MemberState.UPDATING)
        logged["rollout/servers"] = float(sum(m.state in serve for m in members))
        # Of one that has come meanwhile the next batch will tell.
        idle_s = [m.idle_s - before[m.slot] for m in members if m.slot in before]
        if idle_s:
            logged["idle/server_fraction"] = fmean(idle_s) / period
        self._idle_s = {m.slot: m.idle_s for m in members}
        return logged


@dataclass(frozen=True)
class Beginning:
    """What is known only once a checkpoint, if any, was restored.

    Attributes:
        run_id: Names this run's weights on the servers.
        restored: State of the producer to go on from.
        remaining_batches: Rollout batches that the trainer will still take; None: no limit known.
        sync: How weights travel.
        probe: What servers score; the trainer's, since hooks may make other prompts each time.
        trainer_gpu: Rank 0's, as torch numbers them; None: it has none.
    """

    run_id: str
    restored: dict[str, Any] | None
    remaining_batches: int | None
    sync: SyncSettings
    probe: Probe
    trainer_gpu: int | None = None


@asynccontextmanager
async def open_live(
    settings: SessionSettings,
    material: Material,
    beginning: Future[Beginning],
    carry: Callable[[Transport], Transport] | None = None,
) -> AsyncIterator[Live]:
    """Start everything; on the way out stop everything, in the reverse order.

    Servers start at once, the rest when `beginning` is there. `carry` wraps the transport
    that was chosen, where rollouts run in a process of their own.
    """
    settings.servers.deterministic = settings.deterministic
    settings.servers.tells_routes = settings.router_replay
    raise_file_limit()  # first of all, so that what is started has it, too
    try:
        if settings.servers.fits_load:
            settings.servers.load = await anyio.to_thread.run_sync(material.load_of, settings)
        async with contextlib.AsyncExitStack() as stack:
            scorer = await stack.enter_async_context(_scorer(settings))
            await _try_rewards(settings, material, scorer)
            handles = await anyio.to_thread.run_sync(
                settings.servers.start, settings.model_path, settings.run_dir
            )
            begun = await asyncio.wrap_future(beginning)
            pool = await stack.enter_async_context(
                _open_pool(settings, material, begun.run_id, handles)
            )
            publisher = _publisher(settings, material, begun, pool, carry)
            runner = EpisodeRunner(
                settings.workflow,
                pool,
                scorer,
                material.tokenizer,
                settings.group_size,
                settings.seed,
            )
            producer = _producer(settings, material, runner, begun)
            try:
                async with producer:
                    yield Live(pool, publisher, producer)
            finally:
                await publisher.close()  # Nothing is in flight now that would see the name change.
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(settings.servers.stop)


@asynccontextmanager
async def _open_pool(
    settings: SessionSettings,
    material: Material,
    run_id: str,
    handles: list[ServerHandle],
) -> AsyncIterator[ServerPool]:
    servers: Servers = settings.servers

    async def restart(url: str) -> ServerHandle:
        # Whoever closes does not wait for it: `stop`, which comes then, ends it.
        return await anyio.to_thread.run_sync(servers.restart, url, abandon_on_cancel=True)

    async def look() -> list[ServerHandle]:
        return await anyio.to_thread.run_sync(servers.look, abandon_on_cancel=True)

    async def is_gone(url: str) -> bool:
        return await anyio.to_thread.run_sync(servers.is_gone, url, abandon_on_cancel=True)

    limits, listing = settings.limits, Listing(servers.listed_in, look, servers.look_every_s)
    episodes = (settings.max_staleness + 1) * settings.batch_size * settings.group_size
    wanted = min(limits.max_in_flight or episodes, episodes)
    pool = ServerPool(
        handles,
        replace(material.requirements(run_id), deterministic=settings.deterministic),
        lambda ids: material.tokenizer.decode(ids, skip_special_tokens=True),
        spell=lambda ids: material.tokenizer.decode(ids, skip_special_tokens=False),
        api_key=servers.api_key,
        limits=PoolLimits(
            max_in_flight=room_for_connections(wanted, len(handles), raise_file_limit()),
            request_timeout_s=limits.request_timeout_s,
            together=settings.workflow.asks_once,
        ),
        restart=restart if servers.can_restart else None,
        health=HealthPolicy(
            patience_s=limits.server_timeout_s,
            max_restarts=limits.max_server_restarts,
            min_servers=0 if servers.listed_in else 1,  # where others may come
        ),
        listing=listing if servers.listed_in else None,
    )
    pool.hold()  # until the servers are known to hold the trainer's weights
    pool.on_silence(is_gone)
    async with pool:
        yield pool


def _scorer(settings: SessionSettings) -> RewardScorer:
    limits = settings.limits
    return RewardScorer(
        settings.workflow.reward_functions, limits.reward_processes, limits.reward_timeout_s
    )


async def _try_rewards(settings: SessionSettings, material: Material, scorer: RewardScorer) -> None:
    """Refuse rewards that can't work before anything costs time."""
    limit_s = min(_TRIAL_S, scorer.timeout_s)
    score = functools.partial(scorer.score, timeout_s=limit_s)
    for name, prompt in material.first_prompts.items():
        await settings.workflow.of(name).try_rewards(prompt, score)
    scorer.forget_counts()


def _publisher(
    settings: SessionSettings,
    material: Material,
    begun: Beginning,
    pool: ServerPool,
    carry: Callable[[Transport], Transport] | None,
) -> WeightPublisher:
    transport = choose_transport(
        begun.sync.transport,
        settings.servers,
        begun.trainer_gpu,
        on_cpu=any(member.on_cpu for member in pool.members),
    )
    if carry is not None:
        transport = carry(transport)
    place = Place(settings.run_dir, Path(settings.model_path), begun.sync.bucket_bytes)
    transport.bind(place)
    routes = material.routes is not None
    mode = choose_interruption(begun.sync.interruption, pool.members, routes)
    if begun.sync.release_memory:
        check_memory_release(pool.members)
    publisher = WeightPublisher(pool, transport, begun.run_id, begun.probe, begun.sync, mode)
    precisions = {member.precision for member in pool.members}

    async def restore(member: Member) -> None:
        """Also of a server that was not there when the others were looked at."""
        check_joins(member, mode, precisions)
        if begun.sync.release_memory:
            check_memory_release([member])
        await publisher.restore(member)

    pool.on_restart(restore)
    pool.on_leave(publisher.part)
    return publisher


def _producer(
    settings: SessionSettings, material: Material, runner: EpisodeRunner, begun: Beginning
) -> RolloutProducer:
    limits = settings.limits
    mixture = PromptMixture(material.prompts, settings.curriculum, settings.seed)
    policy: Policy = "strict" if settings.deterministic else limits.straggler_policy
    producer = RolloutProducer(
        mixture,
        runner,
        StalenessGate(settings.batch_size, settings.max_staleness, policy=policy),
        Ledger(mixture.sizes, settings.batch_size, limits.max_failed_fraction),
        limits,
        keep_group=settings.keep_group,
        on_event=settings.on_event,
    )
    if begun.restored is not None:
        producer.load_state_dict(begun.restored)
    producer.set_remaining_batches(begun.remaining_batches)
    return producer


_WHY = {
    "batch_size": "versions are counted in batches",
    "group_size": "finished groups go on with the run",
    "minibatches_per_batch": "the Trainer's steps are counted by it",
    "passes_per_batch": "the Trainer's steps are counted by it",
}
"""Settings of the data module that a checkpoint's positions and counts depend on."""
_BEGIN_ANEW = (
    "Set it back, or begin a new run from these weights: `lightning-grpo export` the checkpoint "
    "and set `model.model` to the folder."
)
_WHY_PROMPTS = "a position in the stream would be another prompt"


def to_checkpoint(value: Any) -> Any:
    """Plain data with every `bytes` as a uint8 tensor."""
    if isinstance(value, bytes):
        return torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0)
    if isinstance(value, Mapping):
        return {k: to_checkpoint(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_checkpoint(v) for v in value]
    return value


def from_checkpoint(value: Any) -> Any:
    """The inverse of `to_checkpoint` (tuples come back as lists)."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {k: from_checkpoint(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_checkpoint(v) for v in value]
    return value


def require_same(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on where the checkpoint's positions would mean something else.

    Args:
        saved: Settings of the checkpoint's run that matter.
        given: The same of this run.

    Raises:
        ConfigError: The first that differs.
    """
    for name, value in saved.items():
        if given.get(name, value) != value:
            why = _WHY.get(name, _WHY_PROMPTS)
            raise ConfigError(
                f"data.{name}",
                f"must be what the checkpoint's run had ({why}), {value}, got {given[name]}",
                way_out=_BEGIN_ANEW,
            )


def require_own(checkpoint: Mapping[str, Any], name: str) -> None:
    """Refuse to go on from a checkpoint without a state of this run's data module.

    Lightning keeps it under the name of the class, and passes over one of another name.

    Args:
        checkpoint: The whole of it.
        name: Of this run's class.

    Raises:
        ConfigError: Which class the checkpoint's run had.
    """
    if name not in checkpoint:
        others = [k for k, v in checkpoint.items() if isinstance(v, Mapping) and "run_id" in v]
        raise ConfigError(
            "data",
            "must be of the class that the checkpoint's run had (the prompts would begin anew), "
            f"{', '.join(others) or 'none of ours'}, got {name}",
            way_out=_BEGIN_ANEW,
        )
