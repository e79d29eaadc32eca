"""Fifty weight updates with sixteen requests always in flight: no token lost, doubled or misnamed.

Ten on the embedded engine, so that `make test` stays quick.

A token that was lost or doubled would show in the logprobs of all that follow it, which are
recomputed under the version that each token claims.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.health import choose_interruption
from lightning_grpo.serving.pool import PoolLimits, ServerPool
from lightning_grpo.types import Completion, Interruption
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.publisher import PublishReport, SyncSettings, WeightPublisher
from lightning_grpo.weights.transport import DiskTransport, Place, Transport
from tests.sglang.engines import RETRACTING
from tests.sglang.server import Server
from tests.sglang.traffic import PROBE, TOKENS, MovingWeights, Traffic, largest_difference

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(1000)]

UPDATES = {"embedded": 10}
MANY_UPDATES = 50
EXACT = 1e-4


@asynccontextmanager
async def syncing(
    server: Server, tmp_path: Path, transport: Transport, mode: Interruption
) -> AsyncIterator[tuple[ServerPool, WeightPublisher]]:
    requirements = Requirements("run", 512, 400, frozenset([2]))
    pool = ServerPool([server.handle], requirements, str, limits=PoolLimits(together=True))
    transport.bind(Place(tmp_path, server.model, bucket_bytes=100_000))
    settings = SyncSettings(request_timeout_s=30.0)
    publisher = WeightPublisher(pool, transport, "run", PROBE, settings, mode)
    async with pool:
        assert choose_interruption(mode, pool.members) == mode
        yield pool, publisher
        await publisher.close()


def check_lengths(done: list[tuple[list[int], Completion]]) -> None:
    """Each completion ends at its limit or with the end token, and every token has everything."""
    for _, completion in done:
        count = len(completion.token_ids)
        assert count == len(completion.logprobs) == len(completion.versions)
        assert list(completion.versions) == sorted(completion.versions)
        if completion.finish_reason == "length":
            assert count == TOKENS
        else:
            assert completion.token_ids[-1] == 2
        assert 2 not in completion.token_ids[:-1]


def report(
    name: str, reports: list[PublishReport], done: list[tuple[list[int], Completion]]
) -> str:
    paused = sorted(r.paused_s for r in reports)
    tokens = sum(len(c.token_ids) for _, c in done)
    several = sum(len(set(c.versions)) > 1 for _, c in done)
    interruptions = sum(c.num_interruptions for _, c in done)
    return (
        f"{name}: {len(reports)} updates, paused {paused[len(paused) // 2] * 1e3:.0f} ms (median),"
        f" {paused[-1] * 1e3:.0f} ms (longest); {len(done)} completions, {tokens} tokens,"
        f" {several} of several versions, {interruptions} interruptions"
    )


TRANSPORTS = [
    pytest.param(lambda: DiskTransport(), id="disk"),
    pytest.param(lambda: ProcessGroupTransport("gloo", 20.0), id="group"),
]


async def run(server: Server, tmp_path: Path, transport: Transport, mode: Interruption) -> None:
    trainer = MovingWeights(server.model)
    updates = UPDATES.get(server.kind, MANY_UPDATES)
    reports: list[PublishReport] = []
    async with (
        asyncio.timeout(900),
        syncing(server, tmp_path, transport, mode) as (
            pool,
            publisher,
        ),
    ):
        assert await publisher.adopt(0, trainer.scores(0))
        traffic = Traffic(pool)
        async with traffic.flowing():
            for version in range(1, updates + 1):
                before = len(traffic.done)
                while len(traffic.done) == before:  # noqa: ASYNC110 - any completion at all
                    await asyncio.sleep(0.02)
                reports.append(await trainer.publish(publisher, version))
                assert pool.num_in_flight + pool.num_waiting > 0
    assert not any(r.failures for r in reports)
    assert max(r.probe_diff or 0.0 for r in reports) < EXACT
    assert min(r.probe_change or 1.0 for r in reports) > 0.01
    check_lengths(traffic.done)
    assert len({v for _, c in traffic.done for v in c.versions}) > updates // 2
    print(report(f"{server.kind} {type(transport).__name__} {mode}", reports, traffic.done))
    if mode != "in_place":
        worst = largest_difference(trainer, traffic.done)
        print(f"largest |dlogprob| under the claimed version: {worst:.1e}")
        assert worst < EXACT
    assert server.request("/health", method="GET")[0] == 200


@pytest.mark.parametrize("make_transport", TRANSPORTS)
async def test_requests_taken_back_and_sent_again(
    server: Server, tmp_path: Path, make_transport: type[Transport]
) -> None:
    await run(server, tmp_path, make_transport(), "abort")


@RETRACTING
@pytest.mark.parametrize("make_transport", TRANSPORTS)
async def test_requests_put_back_and_read_again(
    server: Server, tmp_path: Path, make_transport: type[Transport]
) -> None:
    await run(server, tmp_path, make_transport(), "retract")


@pytest.mark.parametrize("make_transport", TRANSPORTS)
async def test_requests_kept_in_place(
    server: Server, tmp_path: Path, make_transport: type[Transport]
) -> None:
    await run(server, tmp_path, make_transport(), "in_place")
