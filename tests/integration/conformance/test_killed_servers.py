"""Two servers, one killed, or stopped, at every point of an update in turn."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from lightning_grpo.servers.process import EmbeddedServers, OwnedServers
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.health import HealthPolicy
from lightning_grpo.serving.pool import ServerPool
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.publisher import SyncSettings, WeightPublisher
from lightning_grpo.weights.transport import DiskTransport, Place, Transport
from tests.sglang.engines import real_servers
from tests.sglang.killing_proxy import KillingProxy
from tests.sglang.traffic import PROBE, MovingWeights, Traffic, largest_difference

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

POLICY = HealthPolicy(interval_s=0.2, check_timeout_s=5.0, failed_checks=2, max_restarts=20)


@asynccontextmanager
async def started(
    servers: OwnedServers, model: Path, run_dir: Path, signum: signal.Signals = signal.SIGKILL
) -> AsyncIterator[KillingProxy]:
    servers.api_key = ""  # one pool, and each would have its own
    (handle,) = await anyio.to_thread.run_sync(servers.start, str(model), run_dir)
    try:
        async with KillingProxy(handle, signum).listening() as proxy:
            yield proxy
    finally:
        await anyio.to_thread.run_sync(servers.stop)


async def until_routable(pool: ServerPool) -> None:
    async with asyncio.timeout(450):  # the real one takes minutes to start on a busy machine
        while not all(m.routable for m in pool.members):  # noqa: ASYNC110 - state of another task
            await asyncio.sleep(0.1)


async def run(
    victim: OwnedServers,
    model: Path,
    tmp_path: Path,
    transport: Transport,
    points: list[str],
    signum: signal.Signals = signal.SIGKILL,
) -> None:
    trainer = MovingWeights(model)
    transport.bind(Place(tmp_path, model, bucket_bytes=100_000))
    async with (
        started(victim, model, tmp_path / "doomed", signum) as doomed,
        started(EmbeddedServers(), model, tmp_path / "other") as other,
    ):

        async def restart(url: str) -> KillingProxy:
            assert url == doomed.url
            doomed.server = await anyio.to_thread.run_sync(victim.restart, doomed.server.url)
            return doomed

        pool = ServerPool(
            [doomed, other],
            Requirements("run", 512, 400, frozenset([2])),
            str,
            restart=restart,
            health=POLICY,
        )
        settings = SyncSettings(request_timeout_s=20.0)
        publisher = WeightPublisher(pool, transport, "run", PROBE, settings)
        pool.on_restart(publisher.restore)
        async with pool:
            first = pool.members[0]
            asked_while_unknown: list[str] = []
            doomed.on_generate = lambda: (
                None if first.routable else asked_while_unknown.append(first.describe())
            )
            traffic = Traffic(pool)
            version = 0
            async with traffic.flowing():
                for number, point in enumerate(points, start=1):
                    doomed.kill_at = point
                    version += 1
                    report = await trainer.publish(publisher, version)
                    assert doomed.num_kills == number, point
                    assert other.url in report.updated, point
                    version += 1
                    report = await trainer.publish(publisher, version)
                    assert other.url in report.updated, point
                    await until_routable(pool)
                    assert [m.version for m in pool.members] == [version, version], point
                    version += 1
                    report = await trainer.publish(publisher, version)
                    assert set(report.updated) == {doomed.url, other.url}, point
            await publisher.close()
        assert not asked_while_unknown
        worst = largest_difference(trainer, traffic.done)
        print(f"{len(points)} kills, {len(traffic.done)} completions, |dlogprob| <= {worst:.1e}")
        assert worst < 1e-4


DISK = ["/pause_generation", "/flush_cache", "/update_weights_from_disk", "/continue_generation"]
# The first one is asked for in the first update only.
GROUP = ["/init_weights_update_group", "/update_weights_from_distributed"]
STOPPED_AT = ["/generate", "/update_weights_from_distributed"]


@pytest.mark.timeout(900)
async def test_an_engine_killed_in_an_update_by_disk_comes_back(
    model_folder: Path, tmp_path: Path
) -> None:
    await run(EmbeddedServers(), model_folder, tmp_path, DiskTransport(), DISK[2:])


@pytest.mark.timeout(900)
async def test_an_engine_killed_in_an_update_by_group_comes_back(
    model_folder: Path, tmp_path: Path
) -> None:
    transport = ProcessGroupTransport("gloo", 20.0)
    await run(EmbeddedServers(), model_folder, tmp_path, transport, GROUP[:1])


@pytest.mark.timeout(900)
async def test_an_engine_that_is_stopped_is_replaced_and_the_other_goes_on(
    model_folder: Path, tmp_path: Path
) -> None:
    transport = ProcessGroupTransport("gloo", 20.0)
    await run(EmbeddedServers(), model_folder, tmp_path, transport, STOPPED_AT, signal.SIGSTOP)


@pytest.mark.sglang
@pytest.mark.timeout(3000)
async def test_the_real_one_that_is_stopped_is_replaced_and_the_other_goes_on(
    model_folder: Path, tmp_path: Path
) -> None:
    transport = ProcessGroupTransport("gloo", 20.0)
    await run(real_servers(), model_folder, tmp_path, transport, STOPPED_AT, signal.SIGSTOP)


@pytest.mark.sglang
@pytest.mark.timeout(3000)
async def test_the_real_one_killed_at_any_point_of_an_update_by_disk_comes_back(
    model_folder: Path, tmp_path: Path
) -> None:
    await run(real_servers(), model_folder, tmp_path, DiskTransport(), [*DISK, "/generate"])


@pytest.mark.sglang
@pytest.mark.timeout(3000)
async def test_the_real_one_killed_at_any_point_of_an_update_by_group_comes_back(
    model_folder: Path, tmp_path: Path
) -> None:
    transport = ProcessGroupTransport("gloo", 20.0)
    await run(real_servers(), model_folder, tmp_path, transport, GROUP)
