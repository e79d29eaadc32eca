"""One server as the pool knows it, and a completion that grows from servers' replies.

What is known of a server (its weights, its requests, its faults) is a `Member`. A completion that
is interrupted, or whose server is lost, is a `Partial` until it is whole.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import anyio

from lightning_grpo.errors import ReplyError
from lightning_grpo.serving.client import LONGEST_WAIT_S, ServerClient, growing
from lightning_grpo.serving.event_loop import in_turns
from lightning_grpo.serving.fitness import ServerFacts
from lightning_grpo.serving.wire import (
    GenerateReply,
    GenerateRequest,
    checked_routes,
    matched_logprobs,
    sampling_params,
    token_versions,
)
from lightning_grpo.types import (
    NO_VERSION,
    Completion,
    RouterShape,
    Routes,
    Sampling,
    ServerActivity,
)

CLOCK_S = 0.01
"""A timer may be early by so much."""

TAIL_LINES = 25

TAIL_BYTES = 16 << 10

GONE = "gone"
"""What a server does that has left, which is nobody's business."""

MOST_ACTIVITIES = 10_000
"""Kept of a server until they are asked for; of a run that nobody watches the oldest go."""


# -- servers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A server that answers.

    Attributes:
        url: `http://host:port`.
        pid: Its process, where it runs on this machine and the run started it.
        log_path: Its output, where the run started it.
        devices: The GPUs that it uses.
    """

    url: str
    pid: int | None = None
    log_path: Path | None = None
    devices: tuple[int, ...] = ()

    def log_tail(self) -> str:
        """The end of its log; empty where there is none."""
        return read_tail(self.log_path) if self.log_path is not None else ""

    def describe(self) -> str:
        """One line: address, process, GPUs, log."""
        parts = [self.url]
        if self.pid is not None:
            parts.append(f"pid {self.pid}")
        if self.devices:
            parts.append("GPU " + ",".join(map(str, self.devices)))
        if self.log_path is not None:
            parts.append(f"log {self.log_path}")
        return "  ".join(parts)


def read_tail(path: Path, num_lines: int = TAIL_LINES) -> str:
    """The last lines of a file; empty if it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])


class MemberState(StrEnum):
    """Whether the server's weights are known."""

    CLEAN = "clean"
    UPDATING = "updating"
    DIRTY = "dirty"
    DEAD = "dead"


@dataclass(eq=False, slots=True)
class Held:
    """One request that a server holds, for as long as its exchange lasts.

    Attributes:
        since_s: When it was sent, on the server's clock of service.
        allowed_s: How long it may take, on the same clock.
        rids: Names of all requests of the exchange; those that join later are added.
        scope: Cancelled when the server is given up.
        called_back_s: When it was called back for being late; None: it was not.
        given_up: Nothing of it is taken any more.
        in_update: Whether weights were being changed when its answer arrived; None: it has not.
    """

    since_s: float
    allowed_s: float
    rids: Sequence[str]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    called_back_s: float | None = None
    given_up: bool = False
    in_update: bool | None = None


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
        renewed: It is, for all that is known, another process than before.
        leaving: It is to be used no more, and what it holds is to go on elsewhere.
        in_flight: Requests of the pool that have a place at it.
        unanswered: Those among them that it works on; what it has answered may still be read here.
        bound: The most requests that it is given at once.
        room: The same where it said that it is busy: grows again as replies come.
        busy: It asked for a pause, which lasts.
        answered_s: When it last sent a token, on its clock of service.
    """

    def __init__(
        self, slot: int, handle: ServerHandle, client: ServerClient, facts: ServerFacts, bound: int
    ) -> None:
        self.slot = slot
        self.bound = bound
        self.in_flight = self.unanswered = 0
        self.drained = anyio.Event()
        self._idle_s = 0.0
        self._idle_since = time.monotonic()
        self.answered_s = -math.inf
        self._service_s = 0.0
        self._serves_since: float | None = None
        self._faults_s: list[float] = []
        self._held: set[Held] = set()
        self._activities: deque[ServerActivity] = deque(maxlen=MOST_ACTIVITIES)
        self._doing = ("out", time.monotonic())
        self.replace(handle, client, facts)

    def replace(self, handle: ServerHandle, client: ServerClient, facts: ServerFacts) -> None:
        """Puts a (re)started server into the slot; it is dirty until its weights are known."""
        self.handle = handle
        self.client = client
        self.facts = facts
        self.state = MemberState.DIRTY
        self.version = NO_VERSION
        self.reason = "its weights were not checked yet"
        self.suspect = False
        self.num_failed_checks = 0
        self.num_suspicions = 0
        self.paused = False
        self.released = False
        self.renewed = True
        self.leaving = False
        self.busy = False
        self.room = self.bound
        self._busy_since: float | None = None
        self._busy_until = 0.0
        self._busy_waits = growing(0.25, LONGEST_WAIT_S)
        self._labels: dict[str, int] = {}
        self._settled = anyio.Event()
        self._count_service()

    def __repr__(self) -> str:
        return f"Member({self.describe()})"

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self.handle.url.rstrip("/")

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
        kept = not (self.suspect or self.busy or self.leaving)
        return self.state is MemberState.CLEAN and kept

    @property
    def service_s(self) -> float:
        """How long it could answer, since it was added: clean, and not paused."""
        since = self._serves_since
        return self._service_s + (0.0 if since is None else time.monotonic() - since)

    @property
    def late(self) -> Held | None:
        """The request that is over its time by most, if one is."""
        now = self.service_s
        # Of what it has answered the rest is this process's to do.
        asked = (held for held in self._held if held.in_update is None)
        longest = max(asked, key=lambda h: now - h.since_s - h.allowed_s, default=None)
        if longest is None or now - longest.since_s <= longest.allowed_s:
            return None
        return longest

    @property
    def idle_s(self) -> float:
        """How long it had no request of the pool, since it was added."""
        now = time.monotonic() - self._idle_since if self.unanswered == 0 else 0.0
        return self._idle_s + now

    def take(self) -> None:
        """A request is given to it; `answer` and `give_back` follow."""
        self._idle_s = self.idle_s
        self.in_flight += 1
        self.unanswered += 1
        if self.unanswered == 1:
            self._note_activity()

    def answer(self) -> None:
        """It works on a request no more, which has ended there, well or not."""
        self.unanswered -= 1
        if self.unanswered == 0:
            self._idle_since = time.monotonic()
            self._note_activity()
            self.drained.set()
            self.drained = anyio.Event()

    def leave(self) -> None:
        """It is to be used no more, until another takes its slot."""
        self.leaving = True
        self._note_activity()

    def give_back(self) -> None:
        """A request's place is free again."""
        self.in_flight -= 1

    def describe(self) -> str:
        """`url clean(3)` or `url dirty: reason`, for messages."""
        if self.state is MemberState.CLEAN:
            return f"{self.url} clean({self.version})"
        return f"{self.url} {self.state}" + (f": {self.reason}" if self.reason else "")

    def mark_updating(self) -> None:
        """From here on its weights are unknown until `mark_clean`."""
        self.state = MemberState.UPDATING
        self.reason = ""
        self._count_service()

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
        self._count_service()
        self._settle()

    async def settled(self) -> None:
        """Waits while its weights are being changed: until they are proved, or given up."""
        while self.state is MemberState.UPDATING:
            await self._settled.wait()

    def mark_dirty(self, reason: str) -> None:
        """Its weights are unknown: whatever it holds of ours is sent elsewhere."""
        if self.state is not MemberState.DEAD:
            self._mark_out(MemberState.DIRTY, reason)

    def mark_dead(self, reason: str) -> None:
        """It is gone, or as good as gone."""
        self._mark_out(MemberState.DEAD, reason)

    def _mark_out(self, state: MemberState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._count_service()
        for held in self._held:
            held.given_up = True
        in_turns([held.scope.cancel for held in self._held])
        self._settle()

    def count_fault(self, forgiven_after_s: float) -> int:
        """It died, or can't be trusted; how often that was within so many seconds of service.

        One that holds requests and has answered none since the last time is forgiven nothing.
        """
        now, faults = self.service_s, self._faults_s
        if not self._held or self.answered_s > max(faults, default=0.0):
            faults = [s for s in faults if now - s < forgiven_after_s]
        self._faults_s = [*faults, now]
        return len(self._faults_s)

    def put_off(self, wait_s: float | None) -> float | None:
        """It wants no request for a while.

        Args:
            wait_s: What it asks for; None: it does not say.

        Returns:
            Seconds until it may be asked again; None where an answer like this one said so.
        """
        self.room = max(1, min(self.room, self.in_flight - 1))
        now = time.monotonic()
        self._busy_since = self._busy_since or now
        if self.busy and (wait_s or 0.0) <= self._busy_until - now:
            return None
        self.busy, wait_s = True, wait_s or next(self._busy_waits)
        self._busy_until = now + wait_s
        return wait_s

    @property
    def busy_s(self) -> float:
        """For how long it has said nothing else than that it is busy."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def end_of_pause(self) -> bool:
        """Whether the pause that it asked for is over; it may be asked again then."""
        self.busy = self.busy and time.monotonic() < self._busy_until - CLOCK_S
        return not self.busy

    def answered(self) -> None:
        """A request was answered well: what was held against it is forgotten."""
        self.answered_s = self.service_s
        self.num_suspicions = 0
        if self.room < self.bound:
            self.room += 1
            self._busy_since = None
            self._busy_waits = growing(0.25, LONGEST_WAIT_S)

    def version_of(self, label: str) -> int:
        """The version of a label that the server reports.

        Raises:
            ReplyError: The label is none that was published to it: someone else changed it.
        """
        version = self._labels.get(label)
        if version is None:
            raise ReplyError(
                f"{self.url} answers with weights {label!r}, which this run did not publish"
                " (is another run using the same server?)"
            )
        return version

    async def pause(self, mode: str = "retract") -> None:
        """Stops the server between two tokens; it holds requests back until `unpause`."""
        await self.client.pause(mode)
        self.paused = True
        self._count_service()

    async def unpause(self) -> None:
        """Lets the server work again."""
        await self.client.resume()
        self.paused = False
        self._count_service()

    async def release_memory(self) -> None:
        """Has the server give its GPU memory back, weights and all."""
        self.released = True
        await self.client.release_memory()

    async def resume_memory(self) -> None:
        """Has it take its memory again; the weights are undefined until an update."""
        await self.client.resume_memory()
        self.released = False

    def hold(self, allowed_s: float, rids: Sequence[str]) -> Held:
        """A request is sent to it; `forget` it afterwards."""
        held = Held(self.service_s, allowed_s, rids)
        self._held.add(held)
        return held

    def hear(self, held: Held) -> None:
        """Its answer to a request has arrived, whole, and is to be read."""
        if held.in_update is None:
            held.in_update = self.state is MemberState.UPDATING
            self.answer()

    def forget(self, held: Held) -> None:
        """The request has ended, well or not."""
        self.hear(held)
        self._held.discard(held)

    def call_back(self, late: Held) -> None:
        """All requests of a late one's exchange are being called back."""
        for held in self._held:
            if held.rids is late.rids:
                held.called_back_s = self.service_s

    def _count_service(self) -> None:
        self._service_s = self.service_s
        serves = self.state is MemberState.CLEAN and not self.paused
        self._serves_since = time.monotonic() if serves else None
        self._note_activity()

    def take_activities(self, *, ongoing: bool = False) -> list[ServerActivity]:
        """What it has done since the last call, and is doing if `ongoing`; from any thread."""
        taken: list[ServerActivity] = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._activities.popleft())
        ongoing = ongoing and self._doing[0] != GONE
        return [*taken, self._until_now(*self._doing)] if ongoing else taken

    def _note_activity(self) -> None:
        doing, since = self._doing
        if self._activity() != doing:
            if doing != GONE:
                self._activities.append(self._until_now(doing, since))
            self._doing = (self._activity(), time.monotonic())

    def _until_now(self, doing: str, since: float) -> ServerActivity:
        seconds = time.monotonic() - since
        return ServerActivity(self.slot, doing, time.time() - seconds, seconds)

    def _activity(self) -> str:
        if self.leaving or self.state in (MemberState.DIRTY, MemberState.DEAD):
            return GONE if self.leaving else "out"
        if self.state is MemberState.UPDATING:
            return "updating"
        if self.paused:
            return "paused"
        return "generating" if self.unanswered else "idle"

    def _settle(self) -> None:
        self._settled.set()
        self._settled = anyio.Event()


# -- completions -----------------------------------------------------------------------------------

Decode = Callable[[Sequence[int]], str]

MAX_IDLE_ABORTS = 50
"""Aborts in a row without one new token, after which a server is at fault."""


class Partial:
    """Collects tokens, logprobs and versions over interruptions.

    Args:
        input_ids: The prompt.
        sampling: The whole budget; what is left of it goes into each next request.
        seed: Goes unchanged into every piece: the server's noise depends on the position.
        end_ids: Tokens that end a completion, beside those of `sampling`.
        routes: What the model's routers choose, if it is asked for; None: it isn't.
    """

    def __init__(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        seed: int | None,
        end_ids: frozenset[int] = frozenset(),
        routes: RouterShape | None = None,
    ) -> None:
        self._prompt = list(input_ids)
        self._sampling = sampling
        self._seed = seed
        self._end_ids = end_ids.union(sampling.stop_token_ids)
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._routes = None if routes is None else Routes(b"", routes)
        self._finish: str | None = None
        self._num_interruptions = 0
        self._num_idle_aborts = 0

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask for."""
        return self._finish is not None

    @property
    def started(self) -> bool:
        """Whether it holds tokens or was interrupted: then it goes before fresh requests."""
        return bool(self._ids) or self._num_interruptions > 0

    def request(self, rid: str, extra_key: str) -> GenerateRequest:
        """The next piece: prompt and tokens so far, with the budget that is left."""
        params = sampling_params(
            self._sampling,
            max_new_tokens=self._sampling.max_new_tokens - len(self._ids),
            min_new_tokens=max(0, self._sampling.min_new_tokens - len(self._ids)),
            seed=self._seed,
        )
        return GenerateRequest(
            input_ids=self._prompt + self._ids,
            sampling_params=params,
            return_logprob=True,
            rid=rid,
            extra_key=extra_key,
            return_routed_experts=self._routes is not None,
        )

    def add(self, reply: GenerateReply, member: Member, pinned_version: int) -> None:
        """Takes one reply in.

        Raises:
            ReplyError: The reply contradicts itself, or names weights that are not ours.
        """
        finish = reply.meta_info.finish_reason
        reason = finish.type if finish is not None else "abort"
        entries = reply.meta_info.output_token_logprobs or []
        ids, logprobs = matched_logprobs(reply.output_ids, entries, reason, member.url)
        versions = token_versions(
            reply.meta_info, len(reply.output_ids), pinned_version, member.version_of, member.url
        )
        self._add_routes(reply, len(ids), reason, member.url)
        self._ids += ids
        self._logprobs += logprobs
        self._versions += versions[: len(ids)]
        # Of an end token that is the last one permitted a server may say `length`, and `abort`
        # where the abort came in the same step.
        ended = bool(ids) and ids[-1] in self._end_ids
        if reason != "abort":
            self._finish = "stop" if ended else reason
            return
        self._num_interruptions += 1
        self._num_idle_aborts = 0 if ids else self._num_idle_aborts + 1
        if ended:
            self._finish = "stop"
        elif len(self._ids) >= self._sampling.max_new_tokens:
            self._finish = "length"
        elif self._num_idle_aborts > MAX_IDLE_ABORTS:
            raise ReplyError(
                f"{member.url} aborted a request {self._num_idle_aborts} times without a new token"
            )

    def completion(self, decode: Decode, spell: Decode | None = None) -> Completion:
        """The finished record.

        Args:
            decode: Token ids to the completion's text.
            spell: Token ids to the text in which stop strings are looked for, special tokens
                included as servers do; None: `decode`.
        """
        assert self._finish is not None, "the completion is not finished"
        self._end_at_stop_string(spell or decode)
        num_read = len(self._prompt) + len(self._ids) - 1
        return Completion(
            token_ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            versions=tuple(self._versions),
            text=decode(self._ids),
            finish_reason=self._finish,
            num_interruptions=self._num_interruptions,
            routes=None if self._routes is None else self._routes.first(num_read),
        )

    def _add_routes(self, reply: GenerateReply, num_kept: int, reason: str, url: str) -> None:
        """Keep the experts that each token was sampled with.

        After an update the tokens before it are read again, and go through other experts then.
        """
        if self._routes is None or not num_kept:
            return
        encoded, before = reply.meta_info.routed_experts, len(self._prompt) + len(self._ids)
        if encoded is not None:
            num_tokens = before + len(reply.output_ids)
            later = checked_routes(encoded, self._routes.shape, num_tokens, url)
            self._routes = self._routes.then(later.first(before + num_kept - 1))
        elif reason != "abort":
            raise ReplyError(
                f"{url} does not say which experts its tokens went through, although it was started"
                " with `enable-return-routed-experts`"
            )

    def _end_at_stop_string(self, spell: Decode) -> None:
        """Ends where an uninterrupted request would have: a server sees only its own piece.

        A stop string that began before an interruption and ended after it is found here, and so is
        one that the last permitted token completes, of which a server may say `length`.
        """
        by_server = self._finish == "stop" and not self._num_interruptions
        if by_server or not self._has_stopped(spell, len(self._ids)):
            return
        low, high = 1, len(self._ids)
        while low < high:
            middle = (low + high) // 2
            if self._has_stopped(spell, middle):
                high = middle
            else:
                low = middle + 1
        if low == len(self._ids) or self._num_interruptions:
            del self._ids[low:], self._logprobs[low:], self._versions[low:]
            self._finish = "stop"

    def _has_stopped(self, spell: Decode, num_tokens: int) -> bool:
        """Whether the first so many tokens spell a stop string."""
        if not self._sampling.stop:
            return False
        text = spell(self._ids[:num_tokens])
        return any(stop in text for stop in self._sampling.stop)
