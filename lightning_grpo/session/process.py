"""Rank 0's rollouts in a process of their own: the trainer's half.

The child is told what to run and asked by the calls of `Rollouts`. Back come groups, events and log
records, and the calls of a transport, whose half that holds the weights is here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from typing_extensions import override

from lightning_grpo.errors import GRPOError, RolloutsLostError
from lightning_grpo.loader import Taken
from lightning_grpo.rollout.scoring import told
from lightning_grpo.session.assembly import Beginning
from lightning_grpo.session.child import TargetFacts
from lightning_grpo.session.material import Material, SessionSettings
from lightning_grpo.session.pipe import Peer, dumps, loads
from lightning_grpo.session.rollouts import Publish, Rollouts, Serving, ThreadRollouts
from lightning_grpo.types import Group, RolloutProgress, ServerActivity
from lightning_grpo.weights.proof import SentScores
from lightning_grpo.weights.publisher import PublishReport
from lightning_grpo.weights.transport import Place, Snapshot, Transport

logger = logging.getLogger(__name__)

PACKAGE = "lightning_grpo"
CLOSE_S = 120.0
"""Servers, rewards and requests may take so long to end before the process is killed."""

START = """
import sys
sys.path.insert(0, sys.argv[1])
from lightning_grpo.session.child import main
main(*map(int, sys.argv[2:]))
"""


def _elsewhere(*given: Any, **named: Any) -> Any:
    """Stands for what only this process can call: its values are asked for by the child."""
    raise AssertionError("called in the trainer's process only")


class UnportableError(GRPOError):
    """Something of the user's can't be passed to another process."""


def packed_settings(settings: SessionSettings) -> bytes:
    """Settings as another process takes them.

    Raises:
        UnportableError: They can't be passed on.
    """
    portable = replace(
        settings,
        training_bytes=settings.training_bytes and _elsewhere,
        on_event=settings.on_event and _elsewhere,
    )
    try:
        data = dumps(portable)
        loads(data)
    except Exception as error:
        raise UnportableError(
            f"prompts, workflow, rewards or servers can't be passed to another one: {told(error)}"
        ) from error
    return data


class _RemoteClient:
    """The calls to a server that a transport makes, made by the child."""

    def __init__(self, peer: Peer, url: str) -> None:
        self.url = url
        self._peer = peer

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self._peer.ask("server", self.url, name, arguments)


class _RemoteTarget(_RemoteClient):
    """A server of the child's."""

    def __init__(self, peer: Peer, facts: TargetFacts) -> None:
        super().__init__(peer, facts.url)
        self.client = _RemoteClient(peer, facts.url)
        vars(self).update(vars(facts))


class TransportHost:
    """The half of a transport that holds the weights, on an event loop that idles between updates.

    Args:
        peer: To the rollouts' process, which has the servers.
    """

    def __init__(self, peer: Peer) -> None:
        self.given: Transport | None = None
        self.snapshot: Future[Snapshot] | None = None
        self._peer = peer
        self._transport: Transport | None = None
        self._thread: AbstractContextManager[BlockingPortal] | None = None
        self._portal: BlockingPortal | None = None
        names = ("bind", "prepare", "send", "abandon", "close_transport")
        peer.handlers |= {name: getattr(self, name) for name in names}

    def bind(self, chosen: Transport, place: Place) -> tuple[bool, bool]:
        """Take the transport that was chosen there, unless one was given here."""
        self._transport = self.given or chosen
        self._transport.bind(place)
        self._thread = start_blocking_portal("asyncio")
        self._portal = self._thread.__enter__()
        return self._transport.in_session, self._transport.prepares_quickly

    def prepare(self, version: int) -> Future[int]:
        """Make the weights at hand ready to be sent."""
        assert self.snapshot is not None, "nothing is published"
        snapshot = self.snapshot.result()
        prepare = self._bound.prepare
        return self._run(anyio.to_thread.run_sync, prepare, snapshot, version)

    def send(self, target: TargetFacts, label: str, timeout_s: float) -> Future[None]:
        """Bring them to one server."""
        return self._run(self._bound.send, self._target(target), label, timeout_s)

    def abandon(self, target: TargetFacts) -> Future[None]:
        """Drop what connects to a server."""
        return self._run(self._bound.abandon, self._target(target))

    def close_transport(self, targets: list[TargetFacts]) -> Future[None]:
        """End what connects to servers."""
        return self._run(self._bound.close, [self._target(target) for target in targets])

    def close(self) -> None:
        """End the loop and what is under way on it."""
        if self._thread is not None and self._portal is not None:
            with contextlib.suppress(RuntimeError):
                self._portal.call(self._portal.stop, True)
            self._thread.__exit__(None, None, None)
            self._thread = self._portal = None

    @property
    def _bound(self) -> Transport:
        assert self._transport is not None, "the transport was not bound"
        return self._transport

    def _target(self, facts: TargetFacts) -> Any:
        return _RemoteTarget(self._peer, facts)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        assert self._portal is not None, "the transport was not bound"
        return self._portal.start_task_soon(function, *arguments)


class ProcessRollouts(Rollouts):
    """Rollouts in a process of their own, so that their work never holds the trainer's interpreter.

    Args:
        settings: What to run.
        packed: The same as `packed_settings`.
    """

    def __init__(self, settings: SessionSettings, packed: bytes) -> None:
        self._settings = settings
        self._packed = packed
        self._process: subprocess.Popen[bytes] | None = None
        self._peer: Peer | None = None
        self._host: TransportHost | None = None
        self._started: Future[None] | None = None
        self._loaded: Future[None] | None = None
        self._begun = self._closing = False
        self._num_published = 0
        self._turns: dict[int, Future[None]] = {}
        self._last_states: list[dict[str, Any] | None] | None = None

    @override
    def start(self) -> Future[None]:
        if self._started is None:
            self._peer = self._open()
            self._loaded = self._peer.call("load", list(sys.path), _levels(), self._packed)
            self._started = _both(self._loaded, self._peer.call("start"))
        return self._started

    def _open(self) -> Peer:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        is_main = threading.current_thread() is threading.main_thread()
        arguments = [root, str(theirs.fileno()), str(os.getpid()), str(int(is_main))]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the trainer's alone
            )
        peer = Peer(ours, self._why_lost)
        self._host = TransportHost(peer)
        peer.handlers |= {"event": self._on_event, "log": _log, "turn": self._on_turn}
        if self._settings.training_bytes is not None:
            peer.handlers["training_bytes"] = self._settings.training_bytes
        peer.start()
        return peer

    @override
    def begin(self, beginning: Beginning) -> None:
        if self._begun:
            return
        self._begun = True
        assert self._host is not None
        self._host.given = beginning.sync.transport
        sync = replace(beginning.sync, transport=None)
        self._running.tell("begin", replace(beginning, sync=sync))

    @property
    def _running(self) -> Peer:
        assert self._peer is not None, "the rollouts were not started"
        return self._peer

    @override
    def take(self, version: int) -> Future[Taken]:
        return self._running.call("take", version)

    @override
    def publish(self, publish: Publish) -> Future[PublishReport]:
        assert self._host is not None
        number = self._num_published = self._num_published + 1
        self._host.snapshot = publish.snapshot
        self._turns[number] = publish.turn
        report = self._running.call("publish", number, publish.version, publish.num_bytes)
        publish.snapshot.add_done_callback(lambda done: self._keep(number, "snapshot", done))
        publish.sent.add_done_callback(lambda done: self._keep(number, "sent", done))
        # One that failed before its turn never has one.
        report.add_done_callback(lambda done: self._on_turn(number, done.exception()))
        return report

    def _keep(self, number: int, name: str, promise: Future[Any]) -> None:
        """Pass on a promise that is kept or broken; the weights themselves stay here."""
        error = promise.exception()
        value = promise.result() if error is None and name == "sent" else None
        self._running.tell("keep_promise", number, name, value, error)

    def _on_turn(self, number: int, error: BaseException | None) -> None:
        turn = self._turns.pop(number, None)
        if turn is not None and error is None:
            turn.set_result(None)
        elif turn is not None and error is not None:
            turn.set_exception(error)

    @override
    def adopt(self, version: int, sent: SentScores) -> Future[bool]:
        return self._running.call("adopt", version, sent)

    @override
    def release_memory(self) -> Future[None]:
        return self._running.call("release_memory")

    @override
    def advance(self, version: int) -> None:
        self._running.call("advance", version).result()

    @override
    def evaluate(self, name: str, first: int, last: int, *, greedy: bool) -> Future[list[Group]]:
        return self._running.call("evaluate", name, first, last, greedy)

    @override
    def state_dict(self, num_unpublished: int) -> dict[str, Any] | None:
        if self._peer is None or not self._is_loaded:
            return None
        if self._closing:
            if self._last_states is None:  # a checkpoint without it would begin anew
                raise RolloutsLostError("the rollouts' process ended before it told its state.")
            return self._last_states[min(num_unpublished, len(self._last_states) - 1)]
        found: dict[str, Any] | None = self._peer.call("state_dict", num_unpublished).result()
        return found

    @override
    def progress(self) -> RolloutProgress | None:
        found: RolloutProgress | None = self._look("progress")
        return found

    @override
    def lag_s(self) -> float | None:
        found: float | None = self._look("lag_s")
        return found

    @override
    def server_activities(self, *, ongoing: bool = False) -> list[ServerActivity]:
        return self._look("server_activities", ongoing) or []

    @override
    def serving(self) -> Serving | None:
        if self._closing or self._started is None or not self._started.done():
            return None
        found: Serving | None = self._running.call("serving").result()
        return found

    @override
    def describe_servers(self) -> str:
        return self._look("describe_servers") or ""

    @property
    def _is_loaded(self) -> bool:
        """Whether the child has opened what it was told to run."""
        loaded = self._loaded
        return loaded is not None and loaded.done() and loaded.exception() is None

    def _look(self, name: str, *arguments: Any) -> Any:
        """What the child says; None before it can, and once it is gone, which others say."""
        if self._peer is None or self._closing or not self._is_loaded:
            return None
        try:
            return self._peer.call(name, *arguments).result()
        except GRPOError:
            return None

    @override
    def close(self) -> None:
        if self._peer is None or self._closing:
            return
        assert self._process is not None
        assert self._host is not None
        try:
            if self._is_loaded:
                self._last_states = self._peer.call("close").result(CLOSE_S)
                self._process.wait(CLOSE_S)
        except (GRPOError, CancelledError, FutureTimeoutError, subprocess.TimeoutExpired) as error:
            logger.debug("the rollouts' process did not end in order: %r", error)
        finally:  # also for Ctrl-C
            self._closing = True
            self._process.kill()
            self._process.wait()
            self._host.close()
            self._peer.close()

    # ---- from the child --------------------------------------------------------------------

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if self._settings.on_event is not None:
            self._settings.on_event(name, **data)

    def _why_lost(self) -> RolloutsLostError:
        assert self._process is not None
        try:
            status = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return RolloutsLostError(
            f"the rollouts' process (pid {self._process.pid}) ended, by {how}. What it last said is"
            " above; by signal 9 the kernel ends what takes too much memory. The run goes on from"
            " its last checkpoint."
        )


def _levels() -> dict[str, int]:
    """Below which records this process has no use for."""
    return {"": logging.getLogger().level, PACKAGE: logging.getLogger(PACKAGE).getEffectiveLevel()}


def _log(record: logging.LogRecord) -> None:
    """Treat a record of the child as one of this process."""
    own = logging.getLogger(record.name)
    if own.isEnabledFor(record.levelno):
        own.handle(record)


def _both(first: Future[None], then: Future[None]) -> Future[None]:
    """The second's outcome, or the first's error."""
    outcome: Future[None] = Future()

    def done(ended: Future[None]) -> None:
        error = first.exception() or ended.exception()
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    then.add_done_callback(done)
    return outcome


def place_rollouts(settings: SessionSettings, material: Material) -> Rollouts:
    """Rollouts where the settings want them, or can have them.

    In a thread they take the interpreter from the trainer: its kernels start later. On a CPU that
    is little beside what both need of the cores, and a process costs seconds to start. Rewards in
    line are for a debugger, which a process has no terminal for.
    """
    where = settings.rollouts_in
    if where == "auto":
        apart = torch.cuda.is_available() and settings.limits.reward_processes > 0
        where = "process" if apart else "thread"
    if where == "process":
        try:
            return ProcessRollouts(settings, packed_settings(settings))
        except UnportableError as error:
            logger.warning("rollouts stay in a thread of the trainer's process: %s", error)
    return ThreadRollouts(settings, material)
