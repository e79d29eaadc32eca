"""Rank 0's rollouts behind a few calls, wherever they run; here, in a thread of the trainer.

What the trainer's process must do itself is the session's: gather weights, hold the memory that is
sent, score it. Everything with an event loop, HTTP, JSON and text is behind `Rollouts`: prompts,
producer, pool, rewards, and the order of a weight update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from lightning_grpo.errors import GRPOError, PromptError
from lightning_grpo.loader import Taken
from lightning_grpo.rollout.producer import RolloutProducer
from lightning_grpo.serving.event_loop import EventLoop
from lightning_grpo.session.assembly import Beginning, Live, open_live
from lightning_grpo.session.material import Material, SessionSettings
from lightning_grpo.types import Group, RolloutProgress, Sampling, ServerActivity
from lightning_grpo.weights.proof import SentScores
from lightning_grpo.weights.publisher import PublishReport
from lightning_grpo.weights.transport import Snapshot, Transport


@dataclass(frozen=True)
class Serving:
    """What the servers say of themselves.

    Attributes:
        precisions: What they compute in, by their own names.
        dtypes: Of their weights.
    """

    precisions: frozenset[str]
    dtypes: frozenset[str]


@dataclass(frozen=True)
class Publish:
    """What a weight update needs of the trainer, and tells it.

    Attributes:
        version: Of the weights.
        num_bytes: How many there will be, as far as is known.
        snapshot: Set once the weights are gathered.
        sent: Set once they are scored.
        turn: Set by the rollouts once the last update has ended: its memory may be overwritten.
    """

    version: int
    num_bytes: int
    snapshot: Future[Snapshot]
    sent: Future[SentScores]
    turn: Future[None]


class Rollouts(ABC):
    """Rank 0's rollouts. A future raises at once when what it waits for has ended."""

    @abstractmethod
    def start(self) -> Future[None]:
        """Start servers and rewards in the background; rollouts wait for `begin`."""

    @abstractmethod
    def begin(self, beginning: Beginning) -> None:
        """Let rollouts begin, with what is known once a checkpoint was restored; once."""

    @abstractmethod
    def take(self, version: int) -> Future[Taken]:
        """The next rollout batch, for a trainer that is at `version`."""

    @abstractmethod
    def publish(self, publish: Publish) -> Future[PublishReport]:
        """Bring weights to the servers."""

    @abstractmethod
    def adopt(self, version: int, sent: SentScores) -> Future[bool]:
        """Name what the servers loaded at their start `version`, if they prove to hold it."""

    @abstractmethod
    def release_memory(self) -> Future[None]:
        """Have the servers give their GPU memory back until the next publish."""

    @abstractmethod
    def advance(self, version: int) -> None:
        """The servers have these weights: groups of the batches trained on are done with."""

    @abstractmethod
    def evaluate(self, name: str, first: int, last: int, *, greedy: bool) -> Future[list[Group]]:
        """Answer held-out prompts `first` to `last` (exclusive) of a set."""

    @abstractmethod
    def state_dict(self, num_unpublished: int) -> dict[str, Any] | None:
        """The producer's state, also after the end; None: it never ran."""

    @abstractmethod
    def progress(self) -> RolloutProgress | None:
        """How far the next rollout batch is; from any thread."""

    @abstractmethod
    def lag_s(self) -> float | None:
        """The longest that the event loop was late since the last call."""

    @abstractmethod
    def server_activities(self, *, ongoing: bool = False) -> list[ServerActivity]:
        """What each server has done since the last call."""

    @abstractmethod
    def serving(self) -> Serving | None:
        """What the servers are; None before they answer."""

    @abstractmethod
    def describe_servers(self) -> str:
        """One line a server."""

    @abstractmethod
    def close(self) -> None:
        """End everything; from any state, any number of times."""


class ThreadRollouts(Rollouts):
    """Rollouts on an event loop in a thread of this process.

    Args:
        settings: What to run.
        material: Opened for it.
        carry: What really moves weights, for the transport that was chosen; None: that itself.

    Attributes:
        live: The parts, once servers answer.
    """

    def __init__(
        self,
        settings: SessionSettings,
        material: Material,
        carry: Callable[[Transport], Transport] | None = None,
    ) -> None:
        self.live: Live | None = None
        self._settings = settings
        self._material = material
        self._carry = carry
        self._service = EventLoop()
        self._starting = ThreadPoolExecutor(1)
        self._started: Future[None] | None = None
        self._beginning: Future[Beginning] = Future()

    @override
    def start(self) -> Future[None]:
        if self._started is None:
            self._started = self._starting.submit(self._service.start, self._build)
        return self._started

    @asynccontextmanager
    async def _build(self) -> AsyncIterator[RolloutProducer]:
        """Everything on the event loop, for the service to hold open."""
        opening = open_live(self._settings, self._material, self._beginning, self._carry)
        async with opening as live:
            self.live = live
            yield live.producer

    @override
    def begin(self, beginning: Beginning) -> None:
        if not self._beginning.done():
            self._beginning.set_result(beginning)

    @property
    def _running(self) -> Live:
        assert self.live is not None, "the rollouts were not started"
        return self.live

    @override
    def take(self, version: int) -> Future[Taken]:
        return self._service.run(self._running.take, version)

    @override
    def publish(self, publish: Publish) -> Future[PublishReport]:
        bring, it = self._running.publisher.publish, publish
        return self._service.run(bring, it.snapshot, it.version, it.sent, it.turn, it.num_bytes)

    @override
    def adopt(self, version: int, sent: SentScores) -> Future[bool]:
        return self._service.run(self._running.publisher.adopt, version, sent)

    @override
    def release_memory(self) -> Future[None]:
        return self._service.run(self._running.publisher.release_memory)

    @override
    def advance(self, version: int) -> None:
        self._service.call(self._running.producer.advance, version)

    @override
    def evaluate(self, name: str, first: int, last: int, *, greedy: bool) -> Future[list[Group]]:
        evaluation = self._settings.evaluation
        asked: tuple[Sampling | None, int] = (evaluation.sampling, evaluation.num_samples)
        if greedy:
            asked = (self._material.greedy, 1)
        try:
            prompts = [self._material.val_prompts[name][i] for i in range(first, last)]
        except PromptError as error:
            failed: Future[list[Group]] = Future()  # told on every rank, where it is waited for
            failed.set_exception(error)
            return failed
        return self._service.run(self._running.producer.evaluate, prompts, *asked)

    @override
    def state_dict(self, num_unpublished: int) -> dict[str, Any] | None:
        if self.live is None:
            return None
        state_dict = self.live.producer.state_dict
        if self._service.is_live:
            return self._service.call(state_dict, num_unpublished)
        return state_dict(num_unpublished)

    @override
    def progress(self) -> RolloutProgress | None:
        if self.live is None or not self._service.is_live:
            return None
        try:
            return self._service.call(self.live.producer.progress)
        except GRPOError:  # it has ended meanwhile, which others will say
            return None

    @override
    def lag_s(self) -> float | None:
        return None if self.live is None else self._service.lag_s()

    @override
    def server_activities(self, *, ongoing: bool = False) -> list[ServerActivity]:
        members = () if self.live is None else self.live.pool.known
        return [done for each in members for done in each.take_activities(ongoing=ongoing)]

    @override
    def serving(self) -> Serving | None:
        if self.live is None:
            return None
        members = self.live.pool.members
        return Serving(
            frozenset(member.precision for member in members),
            frozenset(member.facts.info.dtype for member in members),
        )

    @override
    def describe_servers(self) -> str:
        return self._settings.servers.describe()

    @override
    def close(self) -> None:
        self._beginning.cancel()
        if self._started is not None and not self._started.done():
            self._settings.servers.stop()  # or the end would wait for them to come up
        self._starting.shutdown(wait=True)
        self._service.close()
