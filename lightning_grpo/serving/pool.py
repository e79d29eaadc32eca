"""The servers as one: token ids in, a whole completion out, whatever happens on the way.

A completion survives interruption (its partial tokens are resubmitted after the weight update),
the death of its server (it goes on at another one) and waits while the last server is restarted.
Every token keeps its own logprob and the version of the weights that sampled it.

Servers may come and go (`Listing`): one that comes is used once it has the weights and has proved
them, one that leaves hands on what it is at work on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass

import aiohttp
import anyio

from lightning_grpo.errors import (
    BusyError,
    ConfigError,
    GRPOError,
    OwnLimitError,
    ReplyError,
    RequestError,
    ServerError,
    ServersLostError,
    WeightSyncError,
)
from lightning_grpo.serving.client import ServerClient, Together, growing, new_session
from lightning_grpo.serving.event_loop import FairTurns
from lightning_grpo.serving.fitness import Requirements, ServerFacts, check_ids, verify_server
from lightning_grpo.serving.health import (
    ABORT_INTERVAL_S,
    PROOFS,
    HealthPolicy,
    IsGone,
    Monitor,
    Rank,
    Restart,
    Restore,
    Router,
    SilentError,
    stop_generation,
)
from lightning_grpo.serving.server import Decode, Member, MemberState, Partial, ServerHandle
from lightning_grpo.serving.wire import GenerateRequest, check_reply
from lightning_grpo.types import Completion, Interruption, Sampling

logger = logging.getLogger(__name__)


DEFAULT_BOUND = 256

TELLING = 16
"""A completion of so many tokens tells how fast a server is."""

PREFILL = 10
"""So many tokens of a prompt are read in the time in which one is sampled, or more."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How requests are sent.

    Attributes:
        requests_per_server: Most in flight at one server; None: what it says it runs at once
            (`max_running_requests`), else 256.
        max_in_flight: Most in flight at all servers together; None: no limit.
        request_timeout_s: Longest that a request is left to a server.
        max_failovers: How often one completion may lose its server.
        together: Requests for one prompt that leave at the same moment share an exchange, and come
            back when the longest is done.
        grace_s: What a request may take beside its tokens.
        assumed_tokens_per_s: The least speed of one request, until some were seen.
    """

    requests_per_server: int | None = None
    max_in_flight: int | None = None
    request_timeout_s: float = 600.0
    max_failovers: int = 4
    together: bool = False
    grace_s: float = 30.0
    assumed_tokens_per_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Listing:
    """Where servers that come and go are looked for.

    Attributes:
        name: Of the list, for messages.
        look: The servers that are on it by now.
        every_s: Between two looks.
    """

    name: str
    look: Callable[[], Awaitable[Sequence[ServerHandle]]]
    every_s: float


class Pace:
    """How long a request may be left to a server: by its tokens, and the slowest seen lately.

    A request that is late is called back with the tokens that it has and goes on elsewhere, so a
    narrow limit costs little, and a server that keeps it is found out.
    """

    def __init__(self, limits: PoolLimits) -> None:
        self._limits = limits
        self._seen: deque[float] = deque(maxlen=64)

    def allowed_s(self, request: GenerateRequest, times_late: int) -> float:
        """Seconds of the server's service; twice as many each time that it was late."""
        tokens = request.sampling_params["max_new_tokens"] + len(request.input_ids) / PREFILL
        speed = min(self._seen) / 2 if self._seen else self._limits.assumed_tokens_per_s
        allowed_s = (self._limits.grace_s + tokens / speed) * 2.0**times_late
        return min(allowed_s, self._limits.request_timeout_s)

    def saw(self, num_tokens: int, seconds: float) -> None:
        """A request came back; few tokens say more of the wait before them."""
        if num_tokens >= TELLING:
            self._seen.append(num_tokens / max(seconds, 1e-6))


class ServerPool:
    """Generates on several servers; lives on one event loop between `start` and `close`.

    Consumes token ids. Waits for a server with room, for its reply, and through interruptions and
    restarts. Produces a whole completion, each token with its logprob and version. The workflow
    that asked goes on; between `interrupt` and `resume` nobody does.

    Args:
        handles: The servers, started and healthy.
        requirements: Run id, vocabulary and length that every server must fit.
        decode: Token ids to text, for `Completion.text`.
        spell: The same with special tokens, where stop strings are looked for; None: `decode`.
        api_key: Sent as a bearer token; appears in no message.
        limits: How requests are sent.
        restart: Starts a dead server again; None where the run does not own the servers.
        health: When a server counts as lost.
        listing: Where servers come and go; None: those of `handles` are all, to the end.
    """

    def __init__(  # noqa: PLR0913 - what a pool is put together from
        self,
        handles: Sequence[ServerHandle],
        requirements: Requirements,
        decode: Decode,
        *,
        spell: Decode | None = None,
        api_key: str | None = None,
        limits: PoolLimits | None = None,
        restart: Restart | None = None,
        health: HealthPolicy | None = None,
        listing: Listing | None = None,
    ) -> None:
        if not handles:
            raise ConfigError("`handles` must name at least one server, got none.")
        self._handles = tuple(handles)
        self._requirements = requirements
        self._health = health or HealthPolicy()
        self._decode = decode
        self._spell = spell
        self._api_key = api_key
        self._limits = limits or PoolLimits()
        self._listing = listing
        self._members: list[Member] = []
        self._known: dict[str, Member] = {}
        self._moving: dict[str, anyio.CancelScope | None] = {}
        self._alone_since: float | None = None
        self._together = Together() if self._limits.together else None
        self._rids = itertools.count()
        self._restore: Restore | None = None
        self._part: Restore | None = None
        self._changed = anyio.Event()
        self._pace = Pace(self._limits)
        self._starving_since: float | None = None
        self._turns, self._told = FairTurns(), set[str]()  # of all clients
        self._router = Router(self._members, self._limits.max_in_flight)
        self._monitor = Monitor(
            self._members,
            self._health,
            restart,
            revive=self._revive,
            updating=lambda: self._router.closed,
            changed=self._notify,
            lost=self._fail,
        )
        self._session: aiohttp.ClientSession | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """The servers that are used, whatever their state."""
        return tuple(self._members)

    @property
    def known(self) -> tuple[Member, ...]:
        """These, those that are about to be, and those that have left; by slot."""
        return tuple(self._known.values())

    @property
    def failure(self) -> Exception | None:
        """The error that ended the pool, if one did: the run can't go on."""
        return self._router.error

    @property
    def num_in_flight(self) -> int:
        """Requests that servers hold."""
        return sum(m.in_flight for m in self._members)

    @property
    def num_waiting(self) -> int:
        """Requests that no server has taken yet."""
        return self._router.num_waiting

    def describe(self) -> str:
        """One line a server, for logs and errors."""
        return "\n".join(m.describe() for m in self._members)

    async def start(self, version: int = 0) -> None:
        """Connects and checks every server; they count as holding `version` until an update.

        Raises:
            ConfigError: A server is unfit for this run.
            ServerError: A server does not answer.
        """
        self._session = new_session(self._api_key)
        try:
            found = await asyncio.gather(*map(self._connect, self._handles), return_exceptions=True)
            errors = [each for each in found if isinstance(each, BaseException)]
            # Of servers that come and go, one that can't be used yet is asked again.
            if errors and (self._listing is None or len(errors) == len(found)):
                raise errors[0]
            for handle, each in zip(self._handles, found, strict=True):
                if not isinstance(each, BaseException):
                    member = self._make_member(handle, *each)
                    member.mark_clean(version, member.facts.label)
                    self._members.append(member)
        except BaseException:
            await self.close()
            raise
        self._watching = asyncio.create_task(self._watch(), name="server monitor")

    async def close(self) -> None:
        """Ends the monitor and every connection. Servers are left as they are."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        self._router.fail(ServerError("The server pool was closed."))
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> ServerPool:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def hold(self) -> None:
        """No request leaves before the next `resume`."""
        self._router.close()

    def on_silence(self, is_gone: IsGone) -> None:
        """`is_gone` tells whether the process of a server that does not answer has ended."""
        self._monitor.is_gone = is_gone

    def on_restart(self, restore: Restore) -> None:
        """`restore` brings a server that came (again) to the current weights; marks it clean."""
        self._restore = restore

    def on_leave(self, part: Restore) -> None:
        """`part` ends what connects to a server that is used no more."""
        self._part = part

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        group_key: Hashable = None,
        priority: bool = False,
        seed: int | None = None,
    ) -> Completion:
        """Samples one completion; waits for a server with room, and through interruptions.

        Args:
            input_ids: The prompt.
            sampling: How, and how much.
            group_key: Requests of one key prefer one server, where the prompt is cached.
            priority: Goes before all that is not (evaluation).
            seed: Fixes the noise where the server supports it.

        Raises:
            RequestError: The server refuses the request itself.
            ServerError: It lost its server too often.
            ServersLostError: Too few servers are left for the run.
        """
        check_ids(input_ids, self._requirements.vocab_size)
        needs = self._requirements
        routes = None if priority else needs.routes  # nothing is trained on what has priority
        partial = Partial(input_ids, sampling, seed, needs.end_ids, routes)
        num_failures = num_late = 0
        avoid: Member | None = None
        pauses = growing(0.05, 1.0)
        while not partial.done:
            rank = Rank.CONTINUED if partial.started or num_failures else Rank.FRESH
            rank = Rank.PRIORITY if priority else rank
            member, pause_s = await self._router.acquire(group_key, rank, avoid), 0.0
            avoid, comes_back = None, False
            try:
                num_late += await self._send(member, partial, num_late)
                comes_back = not partial.done
            except RequestError:
                raise
            except BusyError as error:
                self._put_off(member, error)
            except OwnLimitError as error:
                self._starve(error)
                pause_s = next(pauses)
            except ServerError as error:
                num_failures, avoid = num_failures + self._blame(member, error), member
                if num_failures > self._limits.max_failovers:
                    raise
            finally:
                self._router.release(member, comes_back=comes_back)
            if pause_s:
                await asyncio.sleep(pause_s)
        return partial.completion(self._decode, self._spell)

    async def interrupt(self, timeout_s: float = 30.0, mode: Interruption = "abort") -> None:
        """Stops handing out servers and pauses them.

        After `abort` no server works on a request of ours: partial tokens are kept, or still
        being read, and wait for `resume`. A server that does not play along in time is dirty, its
        requests go elsewhere.
        """
        self._router.close()
        async with anyio.create_task_group() as tasks:
            for member in self._members:
                if member.alive:
                    tasks.start_soon(
                        stop_generation, member, timeout_s, self._monitor.suspect, mode
                    )

    async def resume(self) -> None:
        """Hands servers out again, clean ones; a clean server still paused is continued."""
        for member in self.members:
            if member.paused and member.state is MemberState.CLEAN:
                try:
                    await member.unpause()
                except ServerError as error:
                    member.mark_dirty(f"it could not be continued: {error}")
                    self._monitor.wake(member)
        self._router.open()
        self._notify()

    def give_up(self, url: str) -> None:
        """A live server that can't be updated is started again, where the run may do that.

        Elsewhere it is proved again.
        """
        for member in self._members:
            if member.url == url:
                if self._monitor.can_restart:
                    member.mark_dead(member.reason)
                self._monitor.wake(member)

    async def wait_until_clean(self, timeout_s: float) -> None:
        """Waits until at least one server holds known weights (one may be on its way back).

        Raises:
            ServersLostError: Too few servers are left, or none may come (back).
            TimeoutError: None came back in time.
        """
        # Whoever is patient with servers waits for them here, too.
        with anyio.fail_after(max(timeout_s, 2 * self._monitor.patience_s)):
            while not any(m.state is MemberState.CLEAN for m in self._members):
                if self._router.error is not None:
                    raise self._router.error
                returns = any(self._monitor.may_return(m) for m in self._members)
                if not returns and self._listing is None:
                    raise ServersLostError(f"No server is usable:\n{self.describe()}")
                await self._changed.wait()

    async def _send(self, member: Member, partial: Partial, num_late: int) -> bool:
        """One exchange with a server; whether it had to be called back."""
        if not member.routable:
            member.answer()
            raise ServerError(f"{member.describe()}: given up before the request was sent")
        version, run_id = member.version, self._requirements.run_id
        request = partial.request(f"{run_id}-{next(self._rids)}", f"{run_id}:{version}")
        exchange = None if self._together is None else self._together.join(member.client, request)
        rids = [request.rid] if exchange is None else exchange.rids
        held = member.hold(self._pace.allowed_s(request, num_late), rids)
        arrived = functools.partial(member.hear, held)
        try:
            with held.scope:
                ask = member.client.generate if exchange is None else exchange.reply
                reply = await ask(request, arrived)
                self._pace.saw(len(reply.output_ids), member.service_s - held.since_s)
                # Unless it aborts, an update is under way with requests in flight: what they got
                # since counts once the new weights are proved.
                if held.in_update:
                    await member.settled()
        finally:
            member.forget(held)
        if held.given_up:
            raise ServerError(f"{member.describe()}: given up while it held a request")
        check_reply(reply, request, self._requirements.vocab_size, member.url)
        late = held.called_back_s is not None
        if late and not reply.output_ids and member.answered_s < held.since_s:
            raise ReplyError(
                f"{member.url} gave a request back after {held.allowed_s:.0f} s without a token,"
                " and has answered no other meanwhile"
            )
        partial.add(reply, member, version)
        if reply.output_ids:
            member.answered()
        self._router.answered()
        self._starving_since = None
        return late

    def _blame(self, member: Member, error: ServerError) -> bool:
        """Whether the request counts as failed: one whose server leaves loses nothing but time."""
        if member.leaving:
            return False
        if isinstance(error, ReplyError):
            self._monitor.distrust(member, str(error))
        else:
            self._monitor.suspect(member, error)
        return True

    def _put_off(self, member: Member, error: BusyError) -> None:
        """Sends it nothing until the pause that it wants is over."""
        if not member.busy_s:
            logger.warning("server %d is busy and waited for: %s", member.slot, error)
        wait_s = member.put_off(error.wait_s)
        if wait_s is None:
            return
        if member.busy_s > self._monitor.patience_s:
            self._monitor.distrust(member, f"it was busy for {member.busy_s:.0f} s: {error}")
        asyncio.get_running_loop().call_later(wait_s, self._ask_again, member)

    def _ask_again(self, member: Member) -> None:
        if member.end_of_pause():
            self._router.dispatch()

    def _starve(self, error: OwnLimitError) -> None:
        """Leaves it at the requests that this process has connections for."""
        self._router.shrink()
        now = anyio.current_time()
        if self._starving_since is None:
            self._starving_since = now
        if str(error) not in self._told:
            self._told.add(str(error))
            logger.warning("%s", error)
        patience_s = self._monitor.patience_s
        if now - self._starving_since > patience_s:
            self._fail(ConfigError(f"{error}. No request could be sent for {patience_s:g} s."))

    async def _connect(self, handle: ServerHandle) -> tuple[ServerClient, ServerFacts]:
        client = self._client(handle)
        return client, await verify_server(client, self._requirements)

    def _client(self, handle: ServerHandle) -> ServerClient:
        assert self._session is not None, "the pool was not started"
        return ServerClient(
            *(handle.url, self._session, self._requirements.routes),
            request_timeout_s=None,
            told=self._told,
            turns=self._turns,
        )

    async def _revive(self, member: Member, handle: ServerHandle) -> None:
        """Connects a server that answers (again), and brings it to the current weights."""
        version, asked_before = member.version, handle is member.handle
        member.handle = handle  # also if it does not connect: it is found by its new address
        client, facts = await self._connect(handle)
        if asked_before:
            # It may still be at work on what it was asked before it went.
            with contextlib.suppress(ServerError):
                await client.abort()
        # A server that started anew does not know the names of this run's weights.
        same, released = facts.label.startswith(f"{self._requirements.run_id}:"), member.released
        member.replace(handle, client, facts)
        member.released, member.renewed = same and released, not same
        if self._restore is not None:
            await self._restore(member)
        else:
            member.mark_clean(version, facts.label)
        self._notify()

    # -- servers that come and go -----------------------------------------------------------------

    async def _follow(self, listing: Listing) -> None:
        """Lets in the servers that come, and lets go those that leave."""
        async with anyio.create_task_group() as tasks:
            while True:
                handles = {handle.url: handle for handle in await listing.look()}
                used = {member.url: member for member in self._members}
                for url, handle in handles.items():
                    if url not in used and url not in self._moving:
                        self._moving[url] = anyio.CancelScope()
                        tasks.start_soon(self._join, handle, listing)
                for url in self._moving.keys() - handles.keys():
                    if (joins := self._moving[url]) is not None:
                        joins.cancel()
                for url in used.keys() - handles.keys():
                    self._moving[url] = None  # to be let in again only once it is gone
                    tasks.start_soon(self._leave, used[url], listing)
                self._mind_none(listing)
                await anyio.sleep(listing.every_s)

    def _mind_none(self, listing: Listing) -> None:
        """Waits only so long while there is no server that can be used."""
        if any(member.state is MemberState.CLEAN for member in self._members):
            self._alone_since = None
            return
        if self._router.closed:
            return  # they are being updated
        now, patience_s = anyio.current_time(), self._monitor.patience_s
        if self._alone_since is None:
            self._alone_since = now
            logger.warning(
                "no server can be used: waiting up to %g s for one in %s", patience_s, listing.name
            )
        elif now - self._alone_since > patience_s:
            known = "".join(f"\n{member.describe()}" for member in self.known)
            lost = f"No server of {listing.name} could be used for {patience_s:g} s. Go on from"
            lost += f" the newest checkpoint with `--ckpt_path last`.{known}"
            self._fail(ServersLostError(lost))

    async def _join(self, handle: ServerHandle, listing: Listing) -> None:
        """Brings a new server to the current weights and has them proved; then it is used."""
        began, url = anyio.current_time(), handle.url
        scope = self._moving[url]
        assert scope is not None
        with scope:
            await self._until_ready(handle, listing)
            member = self._known[url]
            self._members.append(member)
            self._monitor.watch(member)
            logger.warning(
                "server %d has joined (%s names it) after %.0f s: %s",
                *(member.slot, listing.name, anyio.current_time() - began, member.describe()),
            )
            self._notify()
        if scope.cancelled_caught and url in self._known:
            await self._let_go(self._known[url])
        del self._moving[url]

    async def _until_ready(self, handle: ServerHandle, listing: Listing) -> None:
        """Asks a new server until it holds proved weights."""
        pauses = growing(self._health.interval_s / 2, self._health.longest_pause_s)
        told, proofs, client = set[str](), 0, self._client(handle)
        while proofs < PROOFS:
            try:
                if not await client.listens(self._health.check_timeout_s):
                    raise SilentError(client.trouble)
                if await self._admit(handle):
                    return
                await self._changed.wait()  # there are no weights yet that it could be brought to
                continue
            except (GRPOError, TimeoutError, OSError) as error:
                silent = isinstance(error, SilentError)
                proofs += isinstance(error, WeightSyncError)
                if str(error) not in told:
                    told.add(str(error))
                    logger.warning("a server of %s is not used yet: %s", listing.name, error)
            await anyio.sleep(self._health.interval_s if silent else next(pauses))
        logger.error(
            "%s is not used: it could not be brought to the weights %d times. Take it off %s, and"
            " put it there again once it is mended.",
            *(handle.url, proofs, listing.name),
        )
        await anyio.sleep_forever()

    async def _admit(self, handle: ServerHandle) -> bool:
        """Whether a new server has become clean; it can't before there are weights to be sent."""
        client, facts = await self._connect(handle)
        member = self._known.get(handle.url)
        if member is None:
            member = self._make_member(handle, client, facts)
        else:
            member.replace(handle, client, facts)
        assert self._restore is not None, "nobody brings weights"
        try:
            await self._restore(member)
        except (ServerError, TimeoutError, OSError) as error:
            member.mark_dead(str(error))
            raise
        except BaseException as error:
            member.mark_dirty(str(error))
            raise
        return member.state is MemberState.CLEAN

    async def _leave(self, member: Member, listing: Listing) -> None:
        """Uses a server no more: what it is at work on goes on elsewhere, with its tokens."""
        self._members.remove(member)
        self._monitor.unwatch(member)
        logger.warning(
            "server %d has left (%s names it no more), its %d requests go on elsewhere: %s",
            *(member.slot, listing.name, member.in_flight, member.url),
        )
        await self._let_go(member)
        del self._moving[member.url]

    async def _let_go(self, member: Member) -> None:
        """Takes requests back, and ends what connects to the server."""
        member.leave()
        # A completion that goes on from some tokens is not the same to the last bit.
        if member.state is MemberState.CLEAN and not self._requirements.deterministic:
            with anyio.move_on_after(self._health.call_back_s), contextlib.suppress(ServerError):
                while member.in_flight:
                    if member.unanswered:
                        await member.client.abort()
                    await anyio.sleep(ABORT_INTERVAL_S)
        member.mark_dirty("it has left")
        if self._part is not None:
            with contextlib.suppress(WeightSyncError):  # the run ends, and parts with all of them
                await self._part(member)
        member.mark_dead("it has left")

    def _make_member(
        self, handle: ServerHandle, client: ServerClient, facts: ServerFacts
    ) -> Member:
        told = facts.info.max_running_requests or DEFAULT_BOUND
        bound = self._limits.requests_per_server or max(1, told)
        member = Member(len(self._known), handle, client, facts, bound)
        self._known[member.url] = member
        return member

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
        self._router.dispatch()

    def _fail(self, error: Exception) -> None:
        self._router.fail(error)
        self._notify()

    async def _watch(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._monitor.run)
                if self._listing is not None:
                    tasks.start_soon(self._follow, self._listing)
        except Exception as error:
            self._fail(error)
            raise
