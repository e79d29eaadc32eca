"""Requests under faults of every kind, at once: nothing is lost, counted twice, or kept."""

import asyncio
import itertools
import random
from contextlib import asynccontextmanager

import pytest

from lightning_grpo.errors import ServerError
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.health import HealthPolicy
from lightning_grpo.serving.pool import PoolLimits, ServerPool
from lightning_grpo.serving.server import MemberState
from lightning_grpo.types import Sampling
from tests.fakes.server import FakeServer, Fault, log_softmax, make_table

pytestmark = pytest.mark.anyio

POLICY = HealthPolicy(
    interval_s=0.02, check_timeout_s=0.5, failed_checks=2, max_restarts=10**6, call_back_s=0.2
)
KINDS = ("error", "drop", "busy", "hang", "die")


class Storm:
    """Three servers that fail, are restarted and get new weights while requests come and go."""

    def __init__(self, seed: int, version: str, mode: str, together: bool) -> None:
        self.draw, self.mode, self.over, self.version = random.Random(seed), mode, False, 0
        self.tables = {0: make_table(0)}
        info = {"max_running_requests": 8, "disable_radix_cache": True}
        self.servers = [
            FakeServer(version, self.tables[0], token_delay_s=0.0005, seed=i, info=info)
            for i in range(3)
        ]
        self.servers[0].most_running = 6
        limits = PoolLimits(
            together=together, max_failovers=10**6, grace_s=0.3, assumed_tokens_per_s=1000
        )
        self.pool = ServerPool(
            self.servers,
            Requirements("run"),
            str,
            health=POLICY,
            restart=self.restart,
            limits=limits,
        )
        self.pool.on_restart(self.restore)
        self.updating = asyncio.Lock()

    def server(self, url: str) -> FakeServer:
        return next(each for each in self.servers if each.url == url)

    async def restart(self, url: str) -> FakeServer:
        server = self.server(url)
        await server.kill()
        server.__post_init__()
        server.port, server.label, server.faults = int(url.rpartition(":")[2]), "default", []
        await server.start()
        return server

    async def give(self, member, version: int) -> None:
        server = self.server(member.url)
        server.table, server.label = self.tables[version], f"run:{version}"
        await member.unpause()
        member.mark_clean(version, server.label)

    async def restore(self, member) -> None:
        async with self.updating:
            await self.give(member, self.version)

    async def update(self) -> None:
        """As a publisher does, with servers that it does not reach."""
        version = self.version + 1
        self.tables[version] = make_table(version)
        await self.pool.interrupt(1.0, self.mode)
        chosen = [m for m in self.pool.members if m.state is MemberState.CLEAN]
        for member in chosen:
            member.mark_updating()
            member.expect(version, f"run:{version}")
        for member in chosen:
            await asyncio.sleep(self.draw.choice([0, 0.002]))
            if self.draw.random() < 0.05:
                member.mark_dirty("the update failed")
            elif member.state is MemberState.UPDATING:
                try:
                    await self.give(member, version)
                except ServerError as error:
                    member.mark_dirty(str(error))
        self.version = version
        await self.pool.resume()

    async def blow(self) -> None:
        while not self.over:
            await asyncio.sleep(self.draw.uniform(0.005, 0.04))
            kind = self.draw.choice(KINDS)
            fault = Fault("/generate", kind, retry_after="0.01")
            if kind in KINDS[:3] or self.draw.random() < 0.3:
                self.draw.choice(self.servers).faults.append(fault)
            async with self.updating:
                await self.update()

    async def ask(self, index: int, seed: int) -> bool:
        """Whether it was left to its end; groups of four begin at once with one prompt."""
        group = random.Random(seed * 1000 + index // 4)
        await asyncio.sleep(group.uniform(0.0, 0.6))
        prompt, since = [group.randrange(1, 8)], self.version
        sampling = Sampling(max_new_tokens=self.draw.choice([1, 5, 40]))
        asked = asyncio.create_task(self.pool.generate(prompt, sampling, group_key=index // 4))
        if self.draw.random() < 0.2:
            await asyncio.sleep(self.draw.uniform(0.0, 0.05))
            asked.cancel()
        try:
            done = await asked
        except asyncio.CancelledError:
            return False
        assert len(done.token_ids) == len(done.versions) == sampling.max_new_tokens
        assert since <= done.versions[0]
        assert list(done.versions) == sorted(done.versions)
        pairs = itertools.pairwise([prompt[0], *done.token_ids])
        for (a, b), at, logprob in zip(pairs, done.versions, done.logprobs, strict=True):
            assert logprob == pytest.approx(log_softmax(self.tables[at][a])[b])
        return True


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("version", "mode"), [("0.5.17", "abort"), ("0.5.19", "abort"), ("0.5.19", "retract")]
)
async def test_no_token_is_lost_or_misnamed_and_every_place_is_given_back(version, mode, together):
    storm = Storm(1, version, mode, together)
    async with asyncio.timeout(60):
        for server in storm.servers:
            await server.start()
        await storm.pool.start()
        blowing = asyncio.create_task(storm.blow())
        try:
            done = await asyncio.gather(*(storm.ask(i, seed=1) for i in range(200)))
            storm.over = True
            await blowing
            assert sum(done) > 100
            assert storm.version > 3
            assert [(m.in_flight, m.unanswered) for m in storm.pool.members] == [(0, 0)] * 3
            assert storm.pool.num_waiting == 0
        finally:
            blowing.cancel()
            await storm.pool.close()
            for server in storm.servers:
                await server.kill()


@asynccontextmanager
async def small_pool(together: bool = False):
    """One server that takes one request at a time."""
    async with asyncio.timeout(30), FakeServer(token_delay_s=0.001) as server:
        limits = PoolLimits(requests_per_server=1, together=together)
        async with ServerPool([server], Requirements("run"), str, limits=limits) as pool:
            yield pool


def assert_empty(pool: ServerPool) -> None:
    (member,) = pool.members
    assert (member.in_flight, member.unanswered, pool.num_waiting) == (0, 0, 0)


@pytest.mark.parametrize("together", [False, True])
async def test_a_request_may_be_left_at_any_moment(together):
    async with small_pool(together) as pool:
        for turns in range(60):
            ask = (pool.generate([1], Sampling(max_new_tokens=3), group_key=1) for _ in range(3))
            asked = [asyncio.create_task(each) for each in ask]
            for _ in range(turns):
                await asyncio.sleep(0)
            asked[turns % 3].cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            assert_empty(pool)


@pytest.mark.parametrize("event", ["left", "given up"])
async def test_what_happens_between_a_place_and_its_use_keeps_no_place(event):
    async with small_pool() as pool:
        (member,) = pool.members
        first, second = (
            asyncio.create_task(pool.generate([n], Sampling(max_new_tokens=3))) for n in (1, 2)
        )
        while pool.num_waiting != 1:  # noqa: ASYNC110 - turn by turn
            await asyncio.sleep(0)
        while pool.num_waiting:  # noqa: ASYNC110 - it has its place then, and does not know it yet
            await asyncio.sleep(0)
        second.cancel() if event == "left" else member.mark_dirty("no more")
        await asyncio.wait([first])
        await asyncio.sleep(0.01)
        assert (member.in_flight, member.unanswered) == (0, 0)
        second.cancel()
        await asyncio.wait([second])
        assert_empty(pool)
