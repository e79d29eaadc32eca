"""The process of its own that rank 0's rollouts may run in: the same rollouts, behind a pipe.

Started by `session/process.py`. It ends with the trainer's, however that ends, and takes no signal:
those are the trainer's.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from lightning.fabric.utilities.seed import seed_everything
from typing_extensions import override

from lightning_grpo.errors import ConfigError, RolloutError, ServerError
from lightning_grpo.policy.size import ModelSize
from lightning_grpo.rollout.scoring import die_with, told
from lightning_grpo.session.assembly import Beginning, QuietHeap
from lightning_grpo.session.material import SessionSettings, open_material
from lightning_grpo.session.pipe import Peer, loads
from lightning_grpo.session.rollouts import Publish, ThreadRollouts
from lightning_grpo.weights.transport import Place, Snapshot, Target, Transport

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class TargetFacts:
    """A server as the trainer's end of a transport sees it, at one moment; see `Target`."""

    url: str
    tp_size: int
    update_session: bool
    caches_prefixes: bool
    precision: str
    alive: bool
    released: bool
    renewed: bool

    @classmethod
    def of(cls, target: Target) -> TargetFacts:
        """Of a server as it is now."""
        return cls(**{name: getattr(target, name) for name in cls.__dataclass_fields__})


class CarriedTransport(Transport):
    """A transport whose other half holds the weights, in the trainer's process.

    Args:
        peer: To the trainer's process.
        chosen: What it is, unless a transport was given there.

    Attributes:
        loop: The event loop that it is used on.
    """

    def __init__(self, peer: Peer, chosen: Transport) -> None:
        self._peer = peer
        self._chosen = chosen

    @override
    def bind(self, place: Place) -> None:
        self.loop = asyncio.get_running_loop()
        kind = self._peer.call("bind", self._chosen, place).result()
        self.in_session, self.prepares_quickly = kind

    @override
    def prepare(self, snapshot: Snapshot, version: int) -> int:
        num_bytes: int = self._peer.call("prepare", version).result()
        return num_bytes

    @override
    async def send(self, target: Target, label: str, timeout_s: float) -> None:
        await self._peer.ask("send", TargetFacts.of(target), label, timeout_s)

    @override
    async def abandon(self, target: Target) -> None:
        await self._peer.ask("abandon", TargetFacts.of(target))

    @override
    async def close(self, targets: list[Target]) -> None:
        await self._peer.ask("close_transport", [TargetFacts.of(target) for target in targets])


class LogToTrainer(logging.handlers.QueueHandler):
    """Hands records to the loggers of the trainer's process."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(queue.SimpleQueue[Any]())  # which `enqueue` leaves alone
        self._peer = peer

    @override
    def enqueue(self, record: logging.LogRecord) -> None:
        self._peer.tell("log", record)


class Child:
    """Answers the trainer's calls by rollouts in a thread of this process.

    Args:
        peer: To the trainer's process.

    Attributes:
        ending: Set once this process is to end.
    """

    def __init__(self, peer: Peer) -> None:
        self.ending = threading.Event()
        self._peer = peer
        self._rollouts: ThreadRollouts | None = None
        self._carried: CarriedTransport | None = None
        self._heap = QuietHeap()
        self._publishes: dict[int, Publish] = {}
        self._closed: Future[list[dict[str, Any] | None]] = Future()
        peer.handlers |= {name: getattr(self, name) for name in HANDLED}
        for name in PASSED_ON:
            peer.handlers[name] = self._passes_on(name)

    def _passes_on(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return getattr(self._own, name)(*arguments, **named)

        return call

    @property
    def _own(self) -> ThreadRollouts:
        if self._rollouts is None:
            raise RolloutError("the rollouts' process has not opened its prompts")
        return self._rollouts

    def load(self, path: Sequence[str], levels: dict[str, int], settings: bytes) -> None:
        """Import what the settings need and open them.

        Args:
            path: Where to import from.
            levels: Of loggers, below which the trainer drops records.
            settings: What to run; what only the trainer's process can call is asked for there.
        """
        sys.path[:] = path
        if "PL_GLOBAL_SEED" in os.environ:  # noqa: TID251 - as it was done in the trainer's process
            seed_everything(verbose=False)
        logging.getLogger().addHandler(logging.NullHandler())  # the trainer has said it
        try:
            found: SessionSettings = loads(settings)
        except Exception as error:
            raise ConfigError(
                "rollouts_in",
                "can be `process` only for prompts, workflow, rewards, servers and callbacks that "
                f"another process can import, which failed: {told(error)}",
                way_out="Set `thread`, or move them into a module.",
            ) from error
        found = replace(
            found,
            training_bytes=found.training_bytes and self._training_bytes,
            on_event=found.on_event and self._tell_event,
        )
        self._rollouts = ThreadRollouts(found, open_material(found), self._carry)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger().addHandler(LogToTrainer(self._peer))

    def _carry(self, chosen: Transport) -> Transport:
        self._carried = CarriedTransport(self._peer, chosen)
        return self._carried

    def _training_bytes(self, size: ModelSize, longest: int | None) -> int:
        found: int = self._peer.call("training_bytes", size, longest).result()
        return found

    def _tell_event(self, name: str, **data: Any) -> None:
        self._peer.tell("event", name, data)

    def start(self) -> Future[None]:
        """Start servers and rewards."""
        started = self._own.start()
        started.add_done_callback(lambda _: self._heap.freeze())
        return started

    def begin(self, beginning: Beginning) -> None:
        """Let rollouts begin."""
        self._own.begin(beginning)

    def publish(self, number: int, version: int, num_bytes: int) -> Future[Any]:
        """Begin a weight update; what the trainer promises for it comes by `keep_promise`."""
        snapshot, sent, turn = Future[Snapshot](), Future[Any](), Future[None]()
        turn.add_done_callback(lambda done: self._peer.tell("turn", number, done.exception()))
        self._publishes[number] = publish = Publish(version, num_bytes, snapshot, sent, turn)
        report = self._own.publish(publish)
        report.add_done_callback(lambda _: self._publishes.pop(number, None))
        return report

    def keep_promise(self, number: int, name: str, value: Any, error: BaseException | None) -> None:
        """The weights of an update are gathered, or scored, or will never be."""
        publish = self._publishes.get(number)
        if publish is None:
            return
        promise: Future[Any] = getattr(publish, name)
        if error is None:
            promise.set_result(value)
        else:
            promise.set_exception(error)

    def server(self, url: str, name: str, arguments: tuple[Any, ...]) -> Future[Any]:
        """A call of the trainer's half of a transport to a server."""
        live = self._own.live
        target = next((m for m in live.pool.known if m.url == url), None) if live else None
        if target is None:
            raise ServerError(f"{url} is no server of this run any more")
        assert self._carried is not None
        owner = target if name in OF_TARGET else target.client
        calling = getattr(owner, name)(*arguments)
        # Also while the rollouts end, which take no calls then.
        return asyncio.run_coroutine_threadsafe(calling, self._carried.loop)

    def evaluate(self, name: str, first: int, last: int, greedy: bool) -> Future[Any]:
        """Answer held-out prompts."""
        return self._own.evaluate(name, first, last, greedy=greedy)

    def server_activities(self, ongoing: bool) -> Any:
        """What each server has done."""
        return self._own.server_activities(ongoing=ongoing)

    def close(self) -> Future[list[dict[str, Any] | None]]:
        """End everything; the states that a checkpoint may still ask for."""
        self.ending.set()
        return self._closed

    def lost(self) -> None:
        """The trainer is gone, and with it whatever this was for."""
        if not self.ending.is_set():
            os._exit(1)

    def end(self) -> None:
        """In the main thread, at the end."""
        try:
            states: list[dict[str, Any] | None] = []
            if self._rollouts is not None:
                self._rollouts.close()
                live = self._rollouts.live
                pending = live.producer.gate.num_pending_batches if live is not None else 0
                states = [self._rollouts.state_dict(n) for n in range(pending + 1)]
            self._closed.set_result(states)
        except BaseException as error:
            self._closed.set_exception(error)
            raise
        finally:
            self._peer.flush()


HANDLED = (
    *("load", "start", "begin", "publish", "keep_promise", "server", "evaluate"),
    *("server_activities", "close"),
)
PASSED_ON = (
    *("take", "adopt", "release_memory", "advance", "state_dict", "progress", "lag_s", "serving"),
    "describe_servers",
)
OF_TARGET = ("pause", "unpause", "release_memory", "resume_memory")
"""Calls of a `Target`; the others are its client's."""


def _keep_running(number: int, frame: FrameType | None) -> None:
    """The trainer has the signal, too, and ends this process when its time has come.

    A handler, since what is started from here would inherit that a signal is ignored.
    """


def main(descriptor: int, parent: int, in_main_thread: bool) -> None:
    """Serve until the trainer closes, or is gone."""
    for number in SIGNALS:
        signal.signal(number, _keep_running)
    die_with(parent, by_signal=in_main_thread)
    peer = Peer(socket.socket(fileno=descriptor), lambda: RolloutError("the trainer is gone"))
    child = Child(peer)
    peer.on_lost = child.lost
    peer.start()
    child.ending.wait()
    child.end()
