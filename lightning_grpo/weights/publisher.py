"""The publisher: new weights to all servers, in one order, with a report.

Brings new weights to every server and proves it: a state machine with deadlines.

One publish: interrupt -> flush -> [begin] -> update -> [end] -> continue -> probe; the weights are
gathered and prepared while servers are interrupted, by disk before that.
Each server goes through it on its own, `updating` all the while; any failure makes that one `dirty`
and leaves the others alone. A server is routed to again only after its probe agreed. It is
continued before it answers the probe, because SGLang holds every request back while it is paused;
the pool sends it nothing until it is clean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from lightning_grpo.errors import ServerError, WeightSyncError
from lightning_grpo.types import NO_VERSION, Interruption, InterruptionChoice
from lightning_grpo.weights.proof import (
    Probe,
    Reading,
    Sent,
    SentScores,
    ServerProof,
    TrainerFailedError,
    promised,
    require_trainer,
    scores_of,
    settled,
)
from lightning_grpo.weights.transport import (
    Fleet,
    Snapshot,
    Target,
    Transport,
    UpdateClient,
    UpdateRefusedError,
    require_success,
)


class UpdateTurns:
    """A lock that can be closed: whoever has it then gets a moment, whoever waits is refused."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._scope: anyio.CancelScope | None = None
        self._closed = False

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Waits for the others.

        Raises:
            WeightSyncError: It was closed, before or meanwhile.
        """
        async with self._lock:
            with anyio.CancelScope() as self._scope:
                if not self._closed:
                    yield
                    return
            raise WeightSyncError("the weight publisher was closed")

    async def close(self, wait_s: float) -> None:
        """Waits until nothing is under way; breaks it off after `wait_s`."""
        self._closed = True
        with anyio.move_on_after(wait_s):
            async with self._lock:
                return
        if self._scope is not None:
            self._scope.cancel()
        async with self._lock:
            pass


SLOWEST_BYTES_PER_S = 2e8
"""Weights may take so long beyond the deadlines: a network file system that others use, too."""


@dataclass(frozen=True)
class SyncSettings:
    """How weights travel, and how long each part may take.

    Attributes:
        transport: None chooses by what is there.
        bucket_bytes: Size of flat buckets.
        gather_timeout_s: Deadline of gathering the shards, beside what their bytes may take.
        request_timeout_s: Deadline of each phase at a server; of the transfer beside its bytes.
        verify: Whether a probe must agree after each publish.
        interruption: What is to become of requests in flight.
        recovery_timeout_s: Deadline for a server to come back when none is left.
        release_memory: Whether servers give their GPU memory back while the trainer steps.
    """

    transport: Transport | None = None
    bucket_bytes: int = 2 << 30
    gather_timeout_s: float = 60.0
    request_timeout_s: float = 60.0
    verify: bool = True
    interruption: InterruptionChoice = "auto"
    recovery_timeout_s: float = 300.0
    release_memory: bool = False

    def gather_s(self, num_bytes: int) -> float:
        """How long weights of so many bytes may take to be gathered."""
        return self.gather_timeout_s + num_bytes / SLOWEST_BYTES_PER_S

    def transfer_s(self, num_bytes: int) -> float:
        """How long they may take to a server."""
        return self.request_timeout_s + num_bytes / SLOWEST_BYTES_PER_S


@dataclass
class PublishReport:
    """What one publish did.

    Attributes:
        version: Of the weights.
        num_bytes: Of weights, for one server.
        paused_s: From the interruption until the last server worked again.
        waited_s: How long there was no server that could take the version, in the end.
        seconds: By phase; of the slowest server where each has its own.
        updated: The servers that hold the version now.
        readings: Their probes, where there is one.
        failures: Why the others do not.
        sent_diff: What was sent against the policy, mean |dlogprob|; None where not compared.
    """

    version: int
    num_bytes: int = 0
    paused_s: float = 0.0
    waited_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    updated: list[str] = field(default_factory=list)
    readings: dict[str, Reading] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    sent_diff: float | None = None

    @property
    def probe_diff(self) -> float | None:
        """The largest difference of a server from what was sent, mean |dlogprob|."""
        return max((r.diff for r in self.readings.values()), default=None)

    @property
    def probe_change(self) -> float | None:
        """How far what was sent moved since the previous version, mean |dlogprob|."""
        changes = [r.change for r in self.readings.values() if r.change is not None]
        return max(changes, default=None)

    @asynccontextmanager
    async def phase(self, name: str, timeout_s: float) -> AsyncIterator[None]:
        """Times a phase and ends it at its deadline, by name."""
        started = time.monotonic()
        try:
            with anyio.fail_after(timeout_s):
                yield
        except TimeoutError as error:
            raise WeightSyncError(
                f"`{name}` of version {self.version} took longer than {timeout_s:.3g} s"
            ) from error
        finally:
            elapsed = time.monotonic() - started
            self.seconds[name] = max(self.seconds.get(name, 0.0), elapsed)


logger = logging.getLogger(__name__)


FLUSH_WAIT_S = 0.02


async def flush(client: UpdateClient, report: PublishReport, timeout_s: float) -> None:
    """Empties the prefix cache; a server that holds requests refuses.

    It holds some unless they were aborted; then no prefix is kept (retract), or all (in_place).
    """
    async with report.phase("flush", timeout_s):
        # Over HTTP there is nothing to wait on but another answer.
        while not await client.flush_cache():
            # SGLang's health check is a request, too; one that came between the last abort
            # and the pause would wait in the queue for ever.
            await client.abort()
            await anyio.sleep(FLUSH_WAIT_S)


async def release(target: Target, report: PublishReport, timeout_s: float) -> None:
    """Has the server give its GPU memory back; it must be quite idle."""
    await flush(target.client, report, timeout_s)
    async with report.phase("release", timeout_s):
        await target.release_memory()


async def make_room(
    target: Target, client: UpdateClient, report: PublishReport, timeout_s: float, idle: bool
) -> None:
    """Has it take its GPU memory again, and empty the prefix cache where it is idle."""
    if target.released:
        async with report.phase("resume", timeout_s):
            await target.resume_memory()
    if idle and target.caches_prefixes:
        await flush(client, report, timeout_s)


async def transfer(
    transport: Transport, target: Target, label: str, report: PublishReport, timeout_s: float
) -> None:
    """Sends what the transport prepared, between begin and end where the server demands it."""
    client = target.client
    framed = transport.in_session and target.update_session
    try:
        if framed:
            async with report.phase("begin", timeout_s):
                reply = await client.update("/begin_weight_update", {}, timeout_s)
                require_success(reply, target, "to begin an update")
        async with report.phase("update", timeout_s):
            await transport.send(target, label, timeout_s)
    except (ServerError, WeightSyncError):
        # A session left open would refuse the next attempt.
        if framed:
            with contextlib.suppress(ServerError):
                await client.update("/end_weight_update", {}, timeout_s)
        raise
    if framed:
        async with report.phase("end", timeout_s):
            reply = await client.update("/end_weight_update", {}, timeout_s)
            require_success(reply, target, "to end an update")


async def pause_again(target: Target) -> None:
    """A server with unknown weights is left paused, if it still listens."""
    try:
        await target.pause()
    except ServerError as error:
        logger.info("%s could not be paused again: %s", target.url, error)


async def recover(fleet: Fleet, report: PublishReport, timeout_s: float) -> None:
    """No server took the version: one may be restarting, and `restore` will bring it.

    Raises:
        WeightSyncError: None came back in time.
        ServersLostError: None will.
    """
    reasons = "; ".join(report.failures.values()) or "no server was alive"
    try:
        await fleet.wait_until_clean(timeout_s)
    except TimeoutError as error:
        raise WeightSyncError(
            f"No server could be brought to version {report.version} within {timeout_s:.3g} s:"
            f" {reasons}"
        ) from error


ATTEMPTS = 3
"""A server that fails an update is tried again so often, from the start, before it is given up."""

CLOSE_WAIT_S = 5.0
"""What is under way may take so long to end before it is broken off."""


class WeightPublisher:
    """Publishes versions to a fleet; lives on the fleet's event loop.

    Args:
        fleet: The servers.
        transport: Moves the weights; bound already.
        run_id: Versions are called `"{run_id}:{version}"` on servers.
        probe: What servers are checked with; None where `settings.verify` is false.
        settings: Deadlines.
        interruption: What becomes of requests in flight; the fleet's servers must support it.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: Transport,
        run_id: str,
        probe: Probe | None,
        settings: SyncSettings | None = None,
        interruption: Interruption = "abort",
    ) -> None:
        self._fleet = fleet
        self._transport = transport
        self._run_id = run_id
        self._settings = settings or SyncSettings()
        self._interruption = interruption
        self._proof = ServerProof(probe) if probe is not None and self._settings.verify else None
        self._turns = UpdateTurns()
        self._current: tuple[int, Sent] | None = None
        self._prepared = False
        self._num_bytes = 0
        self._restoring: set[Target] = set()
        self._bringing: dict[Target, anyio.CancelScope] = {}

    async def adopt(self, version: int, sent: SentScores) -> bool:
        """Names what the servers loaded at their start `version`, if a probe says it is that.

        Spares the first publish, where trainer and servers began from the same folder.

        Args:
            version: Of the trainer's weights.
            sent: What they would score if they were sent.

        Returns:
            Whether every server holds the weights; if not, `publish` is due.
        """
        if self._proof is None:
            return False
        async with self._turns.take():
            for target in self._fleet.members:
                await target.unpause()  # a run that crashed may have left it paused
                scores = await self._score(target, target.client, f"{self._run_id}:adopt")
                if not self._proof.agrees(sent, scores, target.precision):
                    return False
            self._current = (version, sent)
            for target in self._fleet.members:
                await self._adopt(target, PublishReport(version))
        await self._fleet.resume()
        return True

    async def publish(
        self,
        snapshot: Snapshot | Future[Snapshot],
        version: int,
        sent: Sent,
        turn: Future[None] | None = None,
        num_bytes: int = 0,
    ) -> PublishReport:
        """Brings `snapshot` to every server that lives, dirty ones included.

        Args:
            snapshot: Whole weights by checkpoint name, not written to before the next publish has
                its turn; of a future, which may be set while the servers are interrupted.
            version: Of these weights.
            sent: What they score (unused without a probe); of a future, which may be set while
                the weights travel.
            turn: Set once no server is sent earlier weights any more, so that their memory may
                be written to.
            num_bytes: How many the snapshot will have, as far as is known: more take longer.

        Returns:
            What happened; `failures` names servers that are left behind.

        Raises:
            WeightSyncError: The snapshot did not come in time, or no server could be brought to the
                version.
            ServersLostError: Too few servers are left.
            TrainerFailedError: A promise was broken. Servers are not left in the middle of a
                transfer, and none is clean.
        """
        report = PublishReport(version, num_bytes)
        turn = turn or Future()
        with promised(turn):
            return await self._publish(snapshot, sent, report, turn)

    async def _publish(
        self,
        snapshot: Snapshot | Future[Snapshot],
        sent: Sent,
        report: PublishReport,
        turn: Future[None],
    ) -> PublishReport:
        async with self._turns.take():
            turn.set_result(None)
            preparing = asyncio.ensure_future(self._prepare(snapshot, report))
            try:
                if not self._transport.prepares_quickly:
                    await preparing
                interrupted = time.monotonic()
                await self._interrupt(report, self._interruption)
                await preparing
            except BaseException:
                preparing.cancel()
                await self._fleet.resume()  # on the weights that they have
                raise
            self._current, self._prepared = (report.version, sent), True
            # A restarted server is `restore`'s: what was connected to it is gone.
            behind = [t for t in self._fleet.members if t.alive and t not in self._restoring]
            async with anyio.create_task_group() as tasks:
                for target in tuple(behind):
                    tasks.start_soon(self._bring, target, report, interrupted, behind)
            require_trainer(sent)
        # Last of all: the trainer need not wait until what was held back is sent.
        await self._fleet.resume()
        if not report.updated:
            began = time.monotonic()
            await recover(self._fleet, report, self._settings.recovery_timeout_s)
            report.waited_s = time.monotonic() - began
        return report

    async def release_memory(self) -> None:
        """Has every server give its GPU memory back; the next publish takes it again.

        The weights are gone then, so the servers are used again only after that publish.

        Raises:
            WeightSyncError: A server did not stop, or is not quite idle, in time.
            ServerError: One did not answer.
        """
        report = PublishReport(NO_VERSION)
        async with self._turns.take():
            await self._interrupt(report, "abort")  # a server must be idle for it
            async with anyio.create_task_group() as tasks:
                for target in self._fleet.members:
                    if target.alive:
                        target.mark_updating()
                        tasks.start_soon(release, target, report, self._settings.request_timeout_s)

    async def restore(self, target: Target) -> None:
        """Brings a server that was out to the current version; it may have started anew.

        Raises:
            WeightSyncError: It could not be proved to hold it.
            ServerError: It failed again.
        """
        self._restoring.add(target)
        try:
            async with self._turns.take():
                await self._restore(target)
        finally:
            self._restoring.discard(target)

    async def _restore(self, target: Target) -> None:
        if self._proof is not None and target.renewed:
            self._proof.forget(target.url)
        await self._transport.abandon(target)
        if self._current is None:
            return
        report = PublishReport(self._current[0], self._num_bytes)
        target.mark_updating()
        if self._prepared:
            await self._update(target, target.client, report)
        else:
            await self._adopt(target, report)

    async def part(self, target: Target) -> None:
        """Lets a server go that is used no more; others may use it then.

        An update of it that is under way is broken off: the trainer would wait for it.

        Raises:
            WeightSyncError: The publisher was closed.
        """
        if target in self._bringing:
            self._bringing[target].cancel()
        async with self._turns.take():
            with anyio.move_on_after(CLOSE_WAIT_S) as answers, contextlib.suppress(ServerError):
                if target.alive:
                    await target.unpause()
                    await self._rename(target)
            if answers.cancelled_caught:
                target.mark_dead("it did not answer when it was let go")
            await self._transport.abandon(target)

    async def close(self) -> None:
        """Ends what connects to servers and gives their weights back to nobody's name.

        A publish may be under way, of a trainer that failed or was stopped. It gets a moment to
        end: a server that is cut off in a transfer may wait minutes for the rest.
        """
        await self._turns.close(CLOSE_WAIT_S)
        alive = [target for target in self._fleet.known if target.alive]
        await self._transport.close(alive)
        for target in alive:
            await self._rename(target)

    async def _rename(self, target: Target) -> None:
        try:
            await target.client.update_weight_version("default")
        except ServerError as error:
            logger.info("%s keeps the name of its weights: %s", target.url, error)

    async def _prepare(self, given: Snapshot | Future[Snapshot], report: PublishReport) -> None:
        async with report.phase("gather", self._settings.gather_s(report.num_bytes)):
            snapshot = await settled(given)
        started = time.monotonic()
        report.num_bytes = self._num_bytes = await anyio.to_thread.run_sync(
            self._transport.prepare, snapshot, report.version
        )
        report.seconds["prepare"] = time.monotonic() - started

    async def _interrupt(self, report: PublishReport, mode: Interruption) -> None:
        started = time.monotonic()
        await self._fleet.interrupt(self._settings.request_timeout_s, mode)
        report.seconds["interrupt"] = time.monotonic() - started

    async def _bring(
        self, target: Target, report: PublishReport, interrupted: float, behind: list[Target]
    ) -> None:
        """Updates one server, in a few attempts; its failure is recorded, not raised."""
        try:
            with anyio.CancelScope() as self._bringing[target]:
                await self._try_to_bring(target, report, interrupted, behind)
        finally:
            del self._bringing[target]

    async def _try_to_bring(
        self, target: Target, report: PublishReport, interrupted: float, behind: list[Target]
    ) -> None:
        client = target.client
        for attempt in self._attempts(report.num_bytes):
            if target.client is not client or not target.alive:
                return
            target.mark_updating()
            try:
                await self._update(target, client, report)
            except (ServerError, WeightSyncError) as error:
                # Whoever is left behind is told of by the monitor.
                logger.info("weight update of %s, attempt %d: %s", target.url, attempt, error)
                report.failures[client.url] = str(error)
                if target.client is not client:
                    return
                target.mark_dirty(str(error))
                await self._transport.abandon(target)
            except TrainerFailedError as error:
                target.mark_dirty(str(error))
                return
            else:
                report.failures.pop(client.url, None)
                report.paused_s = time.monotonic() - interrupted
                behind.remove(target)
                if behind:
                    await self._fleet.resume()  # without the others
                return
        self._fleet.give_up(client.url)

    def _attempts(self, num_bytes: int) -> Iterator[int]:
        """Of an update; none after a deadline has passed, since the trainer and signals wait."""
        until = time.monotonic() + self._settings.transfer_s(num_bytes)
        for attempt in range(ATTEMPTS):
            if attempt == 0 or time.monotonic() < until:
                yield attempt

    async def _update(self, target: Target, client: UpdateClient, report: PublishReport) -> None:
        label = f"{self._run_id}:{report.version}"
        idle = self._interruption == "abort"
        await make_room(target, client, report, self._settings.request_timeout_s, idle)
        target.expect(report.version, label)
        refusal: UpdateRefusedError | None = None
        try:
            allowed_s = self._settings.transfer_s(report.num_bytes)
            await transfer(self._transport, target, label, report, allowed_s)
        except UpdateRefusedError as error:
            # Refused, or done and answered so (a flush that failed): the probe knows.
            if self._proof is None:
                raise
            logger.warning("%s; asking the probe", error)
            refusal = error
        try:
            await self._continue_and_prove(target, client, label, report)
            if refusal is not None:
                await client.update_weight_version(label)
        except (ServerError, WeightSyncError) as error:
            await pause_again(target)
            if refusal is None:
                raise
            raise WeightSyncError(
                f"{refusal} ({error}) Does it serve the model that is trained?"
            ) from error
        if target.client is not client or not target.alive:
            raise WeightSyncError(f"{client.url} was lost while it was updated")
        report.updated.append(client.url)
        target.mark_clean(report.version, label)

    async def _continue_and_prove(
        self, target: Target, client: UpdateClient, label: str, report: PublishReport
    ) -> None:
        # Sent while the server is still paused, the probe is there before what was held goes on:
        # one turn of the loop starts it, the next its requests.
        proof = asyncio.create_task(self._probe(target, client, label, report))
        try:
            for _ in range(2):
                await asyncio.sleep(0)
            async with report.phase("continue", self._settings.request_timeout_s):
                await target.unpause()
            await proof
        finally:
            proof.cancel()
            await asyncio.gather(proof, return_exceptions=True)

    async def _adopt(self, target: Target, report: PublishReport) -> None:
        """Names weights that the server loaded itself."""
        label = f"{self._run_id}:{report.version}"
        await target.client.update_weight_version(label)
        await self._probe(target, target.client, label, report)
        report.updated.append(target.url)
        target.mark_clean(report.version, label)

    async def _probe(
        self, target: Target, client: UpdateClient, label: str, report: PublishReport
    ) -> None:
        if self._proof is None:
            return
        assert self._current is not None
        version, given = self._current
        async with report.phase("probe", self._settings.request_timeout_s):
            scores = await self._score(target, client, f"{label}:probe")
        async with report.phase("trainer", self._settings.request_timeout_s):
            sent = await settled(given)
        report.readings[client.url] = self._proof.check(
            client.url, version, sent, scores, target.precision
        )

    async def _score(
        self, target: Target, client: UpdateClient, extra_key: str
    ) -> list[list[float]]:
        assert self._proof is not None
        sequences = self._proof.sequences_for(target.url)
        return await scores_of(client, sequences, extra_key, self._settings.request_timeout_s)
