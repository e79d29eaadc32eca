"""Fifty weight updates with sixteen requests always in flight: no token lost, doubled or misnamed.

Ten on the embedded engine, so that `make test` stays quick.

A token that was lost or doubled would show in the logprobs of all that follow it, which are
recomputed under the version that each token claims.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.rollout.pool import ServerPool
from lightning_grpo.rollout.verify import Requirements
from lightning_grpo.types import Completion, Sampling
from lightning_grpo.weights.disk import DiskTransport
from lightning_grpo.weights.gather import gather_weights
from lightning_grpo.weights.probe import Probe
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.publisher import SyncSettings, WeightPublisher
from lightning_grpo.weights.report import PublishReport
from lightning_grpo.weights.transport import Interruption, Place, Transport
from tests.sglang.engines import RETRACTING
from tests.sglang.scoring import full_logprobs
from tests.sglang.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]

IN_FLIGHT = 16
UPDATES = {"embedded": 10}
MANY_UPDATES = 50
TOKENS = 150
EXACT = 1e-4
PROBE = Probe(((3, 9, 4, 200, 31), (77, 5, 12)), exact=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Trainer:
    """Weights that move with every version; any version's can be had again."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self._first = {n: p.detach().clone() for n, p in self._model.named_parameters()}

    def at(self, version: int) -> torch.nn.Module:
        """The model of a version."""
        noise = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                step = torch.randn(parameter.shape, generator=noise) * 0.03 * bool(version)
                parameter.copy_(self._first[name] + step)
        return self._model

    def scores(self, version: int) -> list[list[float]]:
        model = self.at(version)
        return [[0.0, *full_logprobs(model, list(ids)).tolist()] for ids in PROBE.sequences]

    async def publish(self, publisher: WeightPublisher, version: int) -> PublishReport:
        snapshot = {n: t.clone() for n, t in gather_weights(self.at(version)).items()}
        return await publisher.publish(snapshot, version, self.scores(version))


class Traffic:
    """Keeps requests in flight until told to stop."""

    def __init__(self, pool: ServerPool) -> None:
        self.done: list[tuple[list[int], Completion]] = []
        self.stopping = False
        self._pool = pool

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            for index in range(IN_FLIGHT):
                tasks.create_task(self._one_after_the_other(index))
            yield
            self.stopping = True

    async def _one_after_the_other(self, index: int) -> None:
        for number in range(10_000):
            if self.stopping:
                return
            prompt = [10 + index, 20 + number % 400, 30, 40]
            completion = await self._pool.generate(prompt, Sampling(max_new_tokens=TOKENS))
            self.done.append((prompt, completion))


@asynccontextmanager
async def syncing(
    server: Server, tmp_path: Path, transport: Transport, mode: Interruption
) -> AsyncIterator[tuple[ServerPool, WeightPublisher]]:
    pool = ServerPool([server.handle], Requirements("run", 512, 400, frozenset([2])), str)
    transport.bind(Place(tmp_path, server.model, bucket_bytes=100_000))
    settings = SyncSettings(request_timeout_s=30.0, interruption=mode)
    publisher = WeightPublisher(pool, transport, "run", PROBE, settings)
    async with pool:
        pool.check_interruption(mode)
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


def check_versions(trainer: Trainer, done: list[tuple[list[int], Completion]]) -> float:
    """Recomputes every token's logprob under the version that it claims; the largest difference."""
    by_version: dict[int, list[tuple[list[int], Completion]]] = defaultdict(list)
    for prompt, completion in done:
        for version in set(completion.versions):
            by_version[version].append((prompt, completion))
    worst = 0.0
    for version, completions in by_version.items():
        model = trainer.at(version)
        for prompt, completion in completions:
            expected = full_logprobs(model, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
            mine = torch.tensor(completion.versions) == version
            difference = (expected - torch.tensor(completion.logprobs)).abs()[mine]
            worst = max(worst, float(difference.max()))
    return worst


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
    trainer = Trainer(server.model)
    updates = UPDATES.get(server.kind, MANY_UPDATES)
    reports: list[PublishReport] = []
    async with (
        asyncio.timeout(300),
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
        worst = check_versions(trainer, traffic.done)
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
