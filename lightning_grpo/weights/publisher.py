"""Brings new weights to every server and proves it: a state machine with deadlines.

One publish: interrupt -> flush -> [begin] -> update -> [end] -> continue -> probe; the weights are
gathered and prepared while servers are interrupted, by disk before that.
Each server goes through it on its own, `updating` all the while; any failure makes that one `dirty`
and leaves the others alone. A server is routed to again only after its probe agreed. It is
continued before it answers the probe, because SGLang holds every request back while it is paused;
the pool sends it nothing until it is clean.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future

import anyio
import anyio.to_thread

from lightning_grpo.errors import ServerError, WeightSyncError
from lightning_grpo.types import NO_VERSION, Interruption
from lightning_grpo.weights.probe import Probe, SentScores, ServerProof
from lightning_grpo.weights.proof import (
    Sent,
    TrainerFailedError,
    promised,
    require_trainer,
    scores_of,
    settled,
)
from lightning_grpo.weights.report import PublishReport as PublishReport
from lightning_grpo.weights.report import SyncSettings as SyncSettings
from lightning_grpo.weights.standstill import (
    make_room,
    pause_again,
    recover,
    release,
    transfer,
)
from lightning_grpo.weights.transport import (
    Fleet,
    Snapshot,
    Target,
    Transport,
    UpdateClient,
    UpdateRefusedError,
)
from lightning_grpo.weights.turns import Turns

logger = logging.getLogger(__name__)

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
        self._turns = Turns()
        self._current: tuple[int, Sent] | None = None
        self._prepared = False
        self._restoring: set[Target] = set()

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

        Returns:
            What happened; `failures` names servers that are left behind.

        Raises:
            WeightSyncError: The snapshot did not come in time, or no server could be brought to the
                version.
            ServersLostError: Too few servers are left.
            TrainerFailedError: A promise was broken. Servers are not left in the middle of a
                transfer, and none is clean.
        """
        report = PublishReport(version)
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
            await recover(self._fleet, report, self._settings.recovery_timeout_s)
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
        report = PublishReport(self._current[0])
        target.mark_updating()
        if self._prepared:
            await self._update(target, target.client, report)
        else:
            await self._adopt(target, report)

    async def close(self) -> None:
        """Ends what connects to servers and gives their weights back to nobody's name.

        A publish may be under way, of a trainer that failed or was stopped. It gets a moment to
        end: a server that is cut off in a transfer may wait minutes for the rest.
        """
        await self._turns.close(CLOSE_WAIT_S)
        alive = [target for target in self._fleet.members if target.alive]
        await self._transport.close(alive)
        for target in alive:
            try:
                await target.client.update_weight_version("default")
            except ServerError as error:
                logger.info("%s keeps the name of its weights: %s", target.url, error)

    async def _prepare(self, given: Snapshot | Future[Snapshot], report: PublishReport) -> None:
        async with report.phase("gather", self._settings.gather_timeout_s):
            snapshot = await settled(given)
        started = time.monotonic()
        report.num_bytes = await anyio.to_thread.run_sync(
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
        client = target.client
        for attempt in range(ATTEMPTS):
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

    async def _update(self, target: Target, client: UpdateClient, report: PublishReport) -> None:
        label = f"{self._run_id}:{report.version}"
        idle = self._interruption == "abort"
        await make_room(target, client, report, self._settings.request_timeout_s, idle)
        target.expect(report.version, label)
        refusal: UpdateRefusedError | None = None
        try:
            await transfer(self._transport, target, label, report, self._settings.request_timeout_s)
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
