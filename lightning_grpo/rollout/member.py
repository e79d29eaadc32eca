"""One server as the pool sees it: which weights it holds, and whether it may be routed to."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Protocol

import anyio

from lightning_grpo.errors import ServerError
from lightning_grpo.rollout.client import ServerClient
from lightning_grpo.rollout.verify import ServerFacts
from lightning_grpo.types import NO_VERSION


class ServerLike(Protocol):
    """What the pool needs to know of a server that somebody else started."""

    @property
    def url(self) -> str:
        """`http://host:port`."""

    @property
    def pid(self) -> int | None:
        """The server's process where it runs on this machine."""

    def log_tail(self) -> str:
        """The end of its log; empty where there is none."""


class MemberState(StrEnum):
    """Whether the server's weights are known."""

    CLEAN = "clean"
    UPDATING = "updating"
    DIRTY = "dirty"
    DEAD = "dead"


class Member:
    """One slot of the pool; the server in it may be replaced by a restart.

    Attributes:
        slot: Position in the pool, which a restart keeps.
        state: Only a `clean` server is routed to.
        version: The weights that a clean server holds; the ones it held before, otherwise.
        reason: Why it is dirty or dead.
        suspect: A request failed on it; not routed to until it answers a health check.
        paused: It was told to hold requests back.
        released: It gave its GPU memory back.
        in_flight: Requests of the pool that it holds.
        bound: The most requests that it is given at once.
        num_deaths: How often its process died or stopped answering.
    """

    def __init__(
        self, slot: int, handle: ServerLike, client: ServerClient, facts: ServerFacts, bound: int
    ) -> None:
        self.slot = slot
        self.bound = bound
        self.num_deaths = 0
        self.in_flight = 0
        self.drained = anyio.Event()
        self._idle_s = 0.0
        self._idle_since = time.monotonic()
        self.replace(handle, client, facts)

    def replace(self, handle: ServerLike, client: ServerClient, facts: ServerFacts) -> None:
        """Puts a (re)started server into the slot; it is dirty until its weights are known."""
        self.handle = handle
        self.client = client
        self.facts = facts
        self.state = MemberState.DIRTY
        self.version = NO_VERSION
        self.reason = "its weights were not checked yet"
        self.suspect = False
        self.num_failed_checks = 0
        self.paused = False
        self.released = False
        self._labels: dict[str, int] = {}
        self._scopes: set[anyio.CancelScope] = set()
        self._settled = anyio.Event()

    def __repr__(self) -> str:
        return f"Member({self.describe()})"

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self.client.url

    @property
    def update_session(self) -> bool:
        """Whether tensor updates must be framed by begin and end."""
        return self.facts.dialect.update_session

    @property
    def tp_size(self) -> int:
        """How many ranks of the server join a weight group."""
        return self.facts.info.tp_size

    @property
    def caches_prefixes(self) -> bool:
        """Whether it keeps what it computed of prompts (as SGLang does unless told not to)."""
        return self.facts.info.disable_radix_cache is not True

    @property
    def precision(self) -> str:
        """What it computes in, by its own name: `bfloat16`, `fp8`, ..."""
        return self.facts.info.precision

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on a CPU, whatever the trainer does."""
        return self.facts.info.device == "cpu"

    @property
    def alive(self) -> bool:
        """Whether it can be talked to."""
        return self.state is not MemberState.DEAD

    @property
    def routable(self) -> bool:
        """Whether requests may be sent to it."""
        return self.state is MemberState.CLEAN and not self.suspect

    @property
    def idle_s(self) -> float:
        """How long it had no request of the pool, since it was added."""
        now = time.monotonic() - self._idle_since if self.in_flight == 0 else 0.0
        return self._idle_s + now

    def take(self) -> None:
        """A request is given to it."""
        self._idle_s = self.idle_s
        self.in_flight += 1

    def give_back(self) -> None:
        """A request has ended, well or not."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle_since = time.monotonic()
            self.drained.set()
            self.drained = anyio.Event()

    def describe(self) -> str:
        """`url clean(3)` or `url dirty: reason`, for messages."""
        if self.state is MemberState.CLEAN:
            return f"{self.url} clean({self.version})"
        return f"{self.url} {self.state}" + (f": {self.reason}" if self.reason else "")

    def mark_updating(self) -> None:
        """From here on its weights are unknown until `mark_clean`."""
        self.state = MemberState.UPDATING
        self.reason = ""

    def expect(self, version: int, label: str) -> None:
        """It is about to get the weights of `version`, which it will call `label`."""
        self._labels[label] = version
        for old in list(self._labels)[:-64]:
            del self._labels[old]

    def mark_clean(self, version: int, label: str) -> None:
        """It holds the weights of `version`, which it calls `label`."""
        self.state = MemberState.CLEAN
        self.version = version
        self.reason = ""
        # One name for each version: a server that restarts on its own has the name from before.
        self._labels = {name: v for name, v in self._labels.items() if v != version}
        self.expect(version, label)
        self._settle()

    async def settled(self) -> None:
        """Waits while its weights are being changed: until they are proved, or given up."""
        while self.state is MemberState.UPDATING:
            await self._settled.wait()

    def mark_dirty(self, reason: str) -> None:
        """Its weights are unknown: whatever it holds of ours is sent elsewhere."""
        if self.state is MemberState.DEAD:
            return
        self.state = MemberState.DIRTY
        self.reason = reason
        self._give_up_requests()
        self._settle()

    def mark_dead(self, reason: str) -> None:
        """It is gone, or as good as gone."""
        self.state = MemberState.DEAD
        self.reason = reason
        self._give_up_requests()
        self._settle()

    def version_of(self, label: str) -> int:
        """The version of a label that the server reports.

        Raises:
            ServerError: The label is none that was published to it: someone else changed it.
        """
        version = self._labels.get(label)
        if version is None:
            raise ServerError(
                f"{self.url} answers with weights {label!r}, which this run did not publish"
                " (is another run using the same server?)"
            )
        return version

    async def pause(self, mode: str = "retract") -> None:
        """Stops the server between two tokens; it holds requests back until `unpause`."""
        await self.client.pause(mode)
        self.paused = True

    async def unpause(self) -> None:
        """Lets the server work again."""
        await self.client.resume()
        self.paused = False

    async def release_memory(self) -> None:
        """Has the server give its GPU memory back, weights and all."""
        self.released = True
        await self.client.release_memory()

    async def resume_memory(self) -> None:
        """Has it take its memory again; the weights are undefined until an update."""
        await self.client.resume_memory()
        self.released = False

    def request_scope(self) -> anyio.CancelScope:
        """A scope that is cancelled when the server is given up; `forget` it afterwards."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        return scope

    def forget(self, scope: anyio.CancelScope) -> None:
        """The request of this scope has ended."""
        self._scopes.discard(scope)

    def _settle(self) -> None:
        self._settled.set()
        self._settled = anyio.Event()

    def _give_up_requests(self) -> None:
        for scope in list(self._scopes):
            scope.cancel()
