"""Pool, publisher and EmbeddedServers together, on the real engine."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.errors import ServersLostError
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.health import HealthPolicy
from lightning_grpo.serving.pool import ServerPool
from lightning_grpo.types import Sampling
from lightning_grpo.weights.gather import gather_weights
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.proof import Probe, SentScores
from lightning_grpo.weights.publisher import SyncSettings, WeightPublisher
from lightning_grpo.weights.transport import DiskTransport, Place
from tests.fakes.forked_servers import ForkedServers
from tests.fakes.tiny_model import make_tiny_model

pytestmark = pytest.mark.anyio

PROBE = Probe(((3, 9, 4, 200, 31), (77, 5, 12)))
FAST = HealthPolicy(interval_s=0.2, check_timeout_s=10.0, failed_checks=3)
PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of several seeds: what a trainer has after several rollout batches."""
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_model(folder / f"seed-{seed}", seed) for seed in range(4)]


class Trainer:
    """The other side: weights of each version, and what they score."""

    def __init__(self, folders):
        self.models = [AutoModelForCausalLM.from_pretrained(f, dtype="float32") for f in folders]

    def snapshot(self, version):
        return gather_weights(self.models[version])

    @torch.no_grad()
    def scores(self, version, ids):
        logits = self.models[version](torch.tensor([ids])).logits[0]
        logprobs = logits.log_softmax(-1)
        return [0.0, *(logprobs[t, i].item() for t, i in enumerate(ids[1:]))]

    def probe(self, version):
        return SentScores([self.scores(version, list(ids)) for ids in PROBE.sequences])

    async def publish(self, publisher, version):
        return await publisher.publish(self.snapshot(version), version, self.probe(version))


@asynccontextmanager
async def running(tmp_path, models, transport, num_servers=1, health=FAST, kind=ForkedServers):
    servers = kind(num_servers)
    handles = await anyio.to_thread.run_sync(servers.start, str(models[0]), tmp_path)

    async def restart(url):
        return await anyio.to_thread.run_sync(servers.restart, url)

    try:
        pool = ServerPool(
            handles,
            Requirements("run", vocab_size=512, max_tokens=400),
            lambda ids: " ".join(map(str, ids)),
            api_key=servers.api_key,
            restart=restart,
            health=health,
        )
        transport.bind(Place(tmp_path, models[0], bucket_bytes=100_000))
        publisher = WeightPublisher(
            pool, transport, "run", PROBE, SyncSettings(request_timeout_s=20.0)
        )
        pool.on_restart(publisher.restore)
        async with asyncio.timeout(100), pool:
            yield pool, publisher, servers
            await publisher.close()
    finally:
        await anyio.to_thread.run_sync(servers.stop)


@pytest.fixture(params=["disk", "group"])
def transport(request):
    return DiskTransport() if request.param == "disk" else ProcessGroupTransport("gloo", 10.0)


def check_exact(trainer, completion, prompt):
    """Every token's logprob is that of the version that it names."""
    ids = [*prompt, *completion.token_ids]
    by_version = {v: trainer.scores(v, ids)[len(prompt) :] for v in set(completion.versions)}
    for position, (version, logprob) in enumerate(
        zip(completion.versions, completion.logprobs, strict=True)
    ):
        assert logprob == pytest.approx(by_version[version][position], abs=1e-4)


async def test_versions_and_logprobs_are_exact_through_publishes(tmp_path, models, transport):
    trainer = Trainer(models)
    async with running(tmp_path, models, transport) as (pool, publisher, _):
        assert await publisher.adopt(0, trainer.probe(0))
        sampling = Sampling(max_new_tokens=300, min_new_tokens=300)

        def begin(n: int) -> asyncio.Task:
            return asyncio.create_task(
                pool.generate([*PROMPT, n], sampling, group_key=n // 4, seed=n)
            )

        generating, version = [], 0
        # Where all publishes came too late for the first, there are others.
        while not any(t.result().num_interruptions for t in generating):
            generating = [begin(n) for n in range(8)]
            for _ in range(3):
                version += 1
                await asyncio.sleep(0.1)
                report = await trainer.publish(publisher, version)
                assert report.probe_diff < 1e-4
                assert report.probe_change > 0.1
                assert not report.failures
            completions = await asyncio.gather(*generating)
    for n, completion in enumerate(completions):
        assert len(completion.token_ids) == 300
        assert list(completion.versions) == sorted(completion.versions)
        check_exact(trainer, completion, [*PROMPT, n])


async def test_an_engine_killed_at_work_is_started_again_until_it_dies_too_often(tmp_path, models):
    trainer = Trainer(models)
    transport = ProcessGroupTransport("gloo", 10.0)
    health = replace(FAST, max_restarts=1)
    async with running(tmp_path, models, transport, health=health, kind=EmbeddedServers) as parts:
        pool, publisher, servers = parts
        assert await publisher.adopt(0, trainer.probe(0))
        await trainer.publish(publisher, 1)
        sampling = Sampling(max_new_tokens=480, min_new_tokens=480)  # still at work when killed
        generating = asyncio.create_task(pool.generate(PROMPT, sampling))
        await asyncio.sleep(0.05)
        assert not generating.done()
        os.kill(servers.handles[0].pid, signal.SIGKILL)
        completion = await generating
        assert set(completion.versions) == {1}
        check_exact(trainer, completion, PROMPT)
        await trainer.publish(publisher, 2)
        assert set((await pool.generate(PROMPT, Sampling(max_new_tokens=3))).versions) == {2}
        url = servers.handles[0].url
        os.kill(servers.handles[0].pid, signal.SIGKILL)
        with pytest.raises(ServersLostError, match="it failed 2 times") as error:
            await pool.generate(PROMPT, sampling)
        assert url in str(error.value)


async def test_one_of_two_engines_killed_in_a_publish_leaves_the_other_and_comes_back(
    tmp_path, models, transport
):
    trainer = Trainer(models)
    async with running(tmp_path, models, transport, num_servers=2) as (pool, publisher, servers):
        await trainer.publish(publisher, 1)
        sampling = Sampling(max_new_tokens=480, min_new_tokens=480)
        generating = [asyncio.create_task(pool.generate([*PROMPT, n], sampling)) for n in range(4)]
        await asyncio.sleep(0.05)
        assert not any(each.done() for each in generating)
        publishing = asyncio.create_task(trainer.publish(publisher, 2))
        await asyncio.sleep(0.01)
        os.kill(servers.handles[0].pid, signal.SIGKILL)
        report = await publishing
        assert servers.handles[1].url in report.updated
        completions = await asyncio.gather(*generating)
        for n, completion in enumerate(completions):
            check_exact(trainer, completion, [*PROMPT, n])
        with anyio.fail_after(60):
            while not all(m.routable for m in pool.members):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert [m.version for m in pool.members] == [2, 2]
        report = await trainer.publish(publisher, 3)
        assert len(report.updated) == 2


async def test_a_hundred_requests_drain_and_nothing_is_lost(tmp_path, models):
    trainer = Trainer(models)
    async with running(tmp_path, models, ProcessGroupTransport("gloo", 10.0)) as parts:
        pool, publisher, _ = parts
        assert await publisher.adopt(0, trainer.probe(0))
        sampling = Sampling(max_new_tokens=40, min_new_tokens=40)
        generating = [
            asyncio.create_task(pool.generate([*PROMPT, n], sampling, group_key=n // 8))
            for n in range(100)
        ]
        for version in (1, 2):
            await asyncio.sleep(0.2)
            await trainer.publish(publisher, version)
        completions = await asyncio.gather(*generating)
    assert all(len(c.token_ids) == len(c.logprobs) == len(c.versions) == 40 for c in completions)
    for n in range(0, 100, 10):
        check_exact(trainer, completions[n], [*PROMPT, n])
