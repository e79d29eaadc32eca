"""The servers as one: token ids in, a whole completion out, whatever happens on the way.

A completion survives interruption (its partial tokens are resubmitted after the weight update),
the death of its server (it goes on at another one) and waits while the last server is restarted.
Every token keeps its own logprob and the version of the weights that sampled it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import aiohttp
import anyio

from lightning_grpo.errors import ConfigError, RequestError, ServerError, ServersLostError
from lightning_grpo.rollout.client import ServerClient, new_session
from lightning_grpo.rollout.interruption import (
    check_memory_release,
    choose_interruption,
    stop_generation,
)
from lightning_grpo.rollout.member import Member, MemberState, ServerLike
from lightning_grpo.rollout.monitor import HealthPolicy, Monitor, Restart, Restore
from lightning_grpo.rollout.partial import Decode, Partial
from lightning_grpo.rollout.routing import Rank, Router
from lightning_grpo.rollout.together import Together
from lightning_grpo.rollout.verify import Requirements, ServerFacts, check_ids, verify_server
from lightning_grpo.rollout.wire import GenerateReply, GenerateRequest
from lightning_grpo.types import Completion, Interruption, InterruptionChoice, Sampling

logger = logging.getLogger(__name__)

DEFAULT_BOUND = 256


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How requests are sent.

    Attributes:
        requests_per_server: Most in flight at one server; None: what it says it runs at once
            (`max_running_requests`), else 256.
        request_timeout_s: Longest generation.
        max_failovers: How often one completion may lose its server.
        together: Requests for one prompt that leave at the same moment share an exchange, and come
            back when the longest is done.
    """

    requests_per_server: int | None = None
    request_timeout_s: float = 600.0
    max_failovers: int = 4
    together: bool = False


class ServerPool:
    """Generates on several servers; lives on one event loop between `start` and `close`.

    Args:
        handles: The servers, started and healthy.
        requirements: Run id, vocabulary and length that every server must fit.
        decode: Token ids to text, for `Completion.text`.
        spell: The same with special tokens, where stop strings are looked for; None: `decode`.
        api_key: Sent as a bearer token; appears in no message.
        limits: How requests are sent.
        restart: Starts a dead server again; None where the run does not own the servers.
        health: When a server counts as lost.
    """

    def __init__(  # noqa: PLR0913 - what a pool is put together from
        self,
        handles: Sequence[ServerLike],
        requirements: Requirements,
        decode: Decode,
        *,
        spell: Decode | None = None,
        api_key: str | None = None,
        limits: PoolLimits | None = None,
        restart: Restart | None = None,
        health: HealthPolicy | None = None,
    ) -> None:
        if not handles:
            raise ConfigError("`handles` must name at least one server, got none.")
        self._handles = tuple(handles)
        self._requirements = requirements
        self._decode = decode
        self._spell = spell
        self._api_key = api_key
        self._limits = limits or PoolLimits()
        self._members: list[Member] = []
        self._together = Together() if self._limits.together else None
        self._rids = itertools.count()
        self._restore: Restore | None = None
        self._failure: Exception | None = None
        self._changed = anyio.Event()
        self._router = Router(self._members)
        self._monitor = Monitor(
            self._members,
            health or HealthPolicy(),
            restart,
            revive=self._revive,
            changed=self._notify,
            lost=self._fail,
        )
        self._session: aiohttp.ClientSession | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """All servers, whatever their state."""
        return tuple(self._members)

    @property
    def failure(self) -> Exception | None:
        """The error that ended the pool, if one did: the run can't go on."""
        return self._failure

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
            for slot, handle in enumerate(self._handles):
                client, facts = await self._connect(handle)
                member = Member(slot, handle, client, facts, self._bound(facts))
                member.mark_clean(version, facts.label)
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
        self._router.fail(self._failure or ServerError("The server pool was closed."))
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> ServerPool:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def on_restart(self, restore: Restore) -> None:
        """`restore` brings a restarted server to the current weights and marks it clean."""
        self._restore = restore

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
        partial = Partial(input_ids, sampling, seed, self._requirements.end_ids)
        num_failures = 0
        while not partial.done:
            rank = Rank.CONTINUED if partial.started or num_failures else Rank.FRESH
            member = await self._router.acquire(group_key, Rank.PRIORITY if priority else rank)
            try:
                await self._send(member, partial)
            except RequestError:
                raise
            except ServerError as error:
                num_failures += 1
                self._monitor.suspect(member, error)
                if num_failures > self._limits.max_failovers:
                    raise
            finally:
                self._router.release(member)
        return partial.completion(self._decode, self._spell)

    def choose_interruption(self, wanted: InterruptionChoice) -> Interruption:
        """The way of interruption to use; refuses one that a server does not support exactly."""
        return choose_interruption(wanted, self._members)

    def check_memory_release(self) -> None:
        """Refuses servers that can't give their GPU memory back."""
        check_memory_release(self._members)

    async def interrupt(self, timeout_s: float = 30.0, mode: Interruption = "abort") -> None:
        """Stops handing out servers and pauses them.

        After `abort` no request of ours is in flight: partial tokens are kept and wait for
        `resume`. A server that does not play along in time is dirty, its requests go elsewhere.
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
        for member in self._members:
            if member.paused and member.state is MemberState.CLEAN:
                try:
                    await member.unpause()
                except ServerError as error:
                    member.mark_dirty(f"it could not be continued: {error}")
                    self._monitor.suspect(member, error)
        self._router.open()
        self._notify()

    def give_up(self, url: str) -> None:
        """A live server that can't be updated is restarted, where the run may do that.

        Elsewhere it stays dirty, and the next update tries again.
        """
        for member in self._members:
            if member.url == url and self._monitor.can_restart:
                member.mark_dead(member.reason)
                self._monitor.wake()

    async def wait_until_clean(self, timeout_s: float) -> None:
        """Waits until at least one server holds known weights (a restart may be under way).

        Raises:
            ServersLostError: Too few servers are left, or none is on its way back.
            TimeoutError: None came back in time.
        """
        with anyio.fail_after(timeout_s):
            while not any(m.state is MemberState.CLEAN for m in self._members):
                if self._failure is not None:
                    raise self._failure
                if not any(self._monitor.may_return(m) for m in self._members):
                    raise ServersLostError(f"No server is usable:\n{self.describe()}")
                await self._changed.wait()

    async def _send(self, member: Member, partial: Partial) -> None:
        if not member.routable:
            raise ServerError(f"{member.describe()}: given up before the request was sent")
        version = member.version
        run_id = self._requirements.run_id
        request = partial.request(f"{run_id}-{next(self._rids)}", f"{run_id}:{version}")
        scope = member.request_scope()
        try:
            with scope:
                reply = await self._exchange(member.client, request)
                # Unless it aborts, an update is under way with requests in flight: what they got
                # since counts once the new weights are proved.
                await member.settled()
        finally:
            member.forget(scope)
        if scope.cancelled_caught:
            raise ServerError(f"{member.describe()}: given up while it held a request")
        try:
            partial.add(reply, member, version)
        except ServerError as error:
            member.mark_dirty(str(error))
            raise

    async def _exchange(self, client: ServerClient, request: GenerateRequest) -> GenerateReply:
        if self._together is None:
            return await client.generate(request)
        return await self._together.generate(client, request)

    async def _connect(self, handle: ServerLike) -> tuple[ServerClient, ServerFacts]:
        assert self._session is not None, "the pool was not started"
        client = ServerClient(
            handle.url, self._session, request_timeout_s=self._limits.request_timeout_s
        )
        return client, await verify_server(client, self._requirements)

    async def _revive(self, member: Member, handle: ServerLike) -> None:
        version = member.version
        client, facts = await self._connect(handle)
        member.replace(handle, client, facts)
        if self._restore is not None:
            await self._restore(member)
        else:
            member.mark_clean(version, facts.label)
        self._notify()

    def _bound(self, facts: ServerFacts) -> int:
        return self._limits.requests_per_server or facts.info.max_running_requests or DEFAULT_BOUND

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
        self._router.dispatch()

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            self._router.fail(error)
            self._notify()

    async def _watch(self) -> None:
        try:
            await self._monitor.run()
        except Exception as error:
            self._fail(error)
            raise
