"""Servers that are cut off, die, hang, drip or lie, and how they come back."""

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from lightning_grpo.errors import ServersLostError, WeightSyncError
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.health import HealthPolicy
from lightning_grpo.serving.pool import PoolLimits, ServerPool
from lightning_grpo.serving.server import MemberState
from lightning_grpo.types import Sampling
from tests.fakes.server import FakeServer, Fault, make_table, until

pytestmark = pytest.mark.anyio
FAST = HealthPolicy(
    interval_s=0.02, check_timeout_s=0.5, failed_checks=2, longest_pause_s=0.05, call_back_s=0.1
)
QUICK = PoolLimits(grace_s=0.1, assumed_tokens_per_s=2000.0)


@asynccontextmanager
async def pool_of(*servers, restore=None, is_gone=None, **options):
    async with asyncio.timeout(30):
        for server in servers:
            await server.start()
        pool = ServerPool(servers, Requirements("run"), str, **{"health": FAST, **options})
        if restore is not None:
            pool.on_restart(restore)
        if is_gone is not None:
            pool.on_silence(is_gone)
        await pool.start()
        for member, server in zip(pool.members, servers, strict=True):
            server.label = "run:0"
            member.mark_clean(0, "run:0")
        try:
            yield pool
        finally:
            await pool.close()
            for server in servers:
                await server.kill()


def lines(caplog, words):
    return [record.message for record in caplog.records if words in record.message]


class Publisher:
    """Brings a server to version 3, as a publisher would, and counts."""

    def __init__(self, servers, fails=0):
        self.servers, self.fails, self.restored = servers, fails, []

    async def __call__(self, member):
        if self.fails:
            self.fails -= 1
            raise WeightSyncError("the proof failed")
        server = next(s for s in self.servers if s.url == member.url)
        server.table, server.label = make_table(3), "run:3"
        self.restored.append(member.slot)
        member.mark_clean(3, "run:3")


async def cut(server, seconds=0.2):
    await server.kill()
    await asyncio.sleep(seconds)
    await server.start()


async def test_a_server_that_is_cut_off_for_a_while_is_asked_again_and_gets_the_weights(caplog):
    server = FakeServer(token_delay_s=0.002)
    publisher = Publisher([server])
    async with pool_of(server, restore=publisher) as pool:
        generating = [
            asyncio.create_task(pool.generate([1, n], Sampling(max_new_tokens=40)))
            for n in range(8)
        ]
        await until(lambda: len(server.running) == 8)
        await cut(server)
        completions = await asyncio.gather(*generating)
        assert {v for c in completions for v in c.versions} == {3}
        assert publisher.restored == [0]
        assert pool.failure is None
    told = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 2
    assert f"server 0 is out, and asked again for up to 300 s: {server.url}" in told[0]
    assert f"server 0 is back after 0 s: {server.url} clean(3)" in told[1]


async def test_several_servers_cut_off_at_once_all_come_back(caplog):
    servers = [FakeServer(token_delay_s=0.002, seed=n) for n in range(3)]
    publisher = Publisher(servers)
    async with pool_of(*servers, restore=publisher) as pool:
        generating = [
            asyncio.create_task(pool.generate([1, n], Sampling(max_new_tokens=30), group_key=n))
            for n in range(12)
        ]
        await until(lambda: all(server.running for server in servers))
        await asyncio.gather(*map(cut, servers))
        assert all(len(c.token_ids) == 30 for c in await asyncio.gather(*generating))
        await until(lambda: all(m.routable for m in pool.members))
        assert sorted(publisher.restored) == [0, 1, 2]
    assert len(lines(caplog, "is out")) == len(lines(caplog, "is back")) == 3


async def test_a_server_that_is_away_is_asked_at_one_pace_however_long():
    server = FakeServer()
    patient = replace(FAST, longest_pause_s=1000.0)
    async with pool_of(server, restore=Publisher([server]), health=patient) as pool:
        server.faults += [
            Fault("/health", "error", times=99),
            Fault("/model_info", "error", times=99),
        ]
        await until(lambda: not pool.members[0].alive)
        await until(lambda: server.calls.count("/model_info") > 20)
        server.faults.clear()
        await until(lambda: pool.members[0].routable)


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_server_that_comes_back_with_other_weights_is_restored_before_it_counts(noticed):
    server, asked_before = FakeServer(token_delay_s=0.002), []

    async def restore(member):
        asked_before.extend(server.requests)
        await Publisher([server])(member)

    async with pool_of(server, restore=restore) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: server.running)
        await server.kill()
        if noticed:
            await until(lambda: not pool.members[0].alive)
        server.table, server.label = make_table(9), "default"
        server.requests.clear()
        await server.start()
        assert set((await generating).versions) == {3}
    # One that was back before anybody looked is found out by the name of its weights.
    assert len(asked_before) <= (0 if noticed else 1)


async def test_a_server_that_comes_back_with_another_runs_weights_is_refused_by_name():
    server = FakeServer()
    policy = replace(FAST, patience_s=0.3)
    async with pool_of(server, restore=Publisher([server]), health=policy) as pool:
        await server.kill()
        await until(lambda: not pool.members[0].alive)
        server.label = "other:4"
        await server.start()
        with pytest.raises(ServersLostError, match="'other:4' of another run") as error:
            await pool.generate([1], Sampling())
    assert "--ckpt_path last" in str(error.value)
    assert not server.requests


async def test_a_server_whose_proof_fails_is_proved_again():
    server = FakeServer()
    publisher = Publisher([server], fails=2)
    async with pool_of(server, restore=publisher) as pool:
        await cut(server, 0.0)
        pool.members[0].mark_dirty("for the test")
        assert set((await pool.generate([1], Sampling(max_new_tokens=4))).versions) == {3}
    assert publisher.fails == 0


async def test_a_server_away_for_longer_than_the_patience_is_missed_and_taken_back_later(caplog):
    servers = [FakeServer(), FakeServer()]
    policy = replace(FAST, patience_s=0.1)
    async with pool_of(*servers, restore=Publisher(servers), health=policy) as pool:
        await servers[0].kill()
        await until(lambda: lines(caplog, "is lost"))
        assert pool.failure is None
        await servers[0].start()
        await until(lambda: pool.members[0].routable)
        await servers[1].kill()
        await until(lambda: len(lines(caplog, "is lost")) == 2)
        assert pool.failure is None  # one is left: the one that came back


async def test_a_server_elsewhere_is_started_again_once_its_process_has_ended():
    server, started = FakeServer(token_delay_s=0.002), []
    gone = [False]

    async def restart(url):
        started.append(url)
        await server.start()
        return server

    async def is_gone(url):
        return gone[0]

    options = {"restore": Publisher([server]), "restart": restart, "is_gone": is_gone}
    async with pool_of(server, **options) as pool:
        await cut(server, 0.3)
        await until(lambda: pool.members[0].version == 3)
        assert started == []
        await server.kill()
        await until(lambda: not pool.members[0].alive)
        assert started == []
        gone[0] = True
        assert set((await pool.generate([1], Sampling(max_new_tokens=4))).versions) == {3}
    assert started == [server.url]


async def test_deaths_are_forgiven_after_good_service():
    server, deaths = FakeServer(), 6

    async def restart(url):
        await server.start()
        return server

    policy = replace(FAST, max_restarts=1, forgiven_after_s=0.05)
    async with pool_of(server, restore=Publisher([server]), restart=restart, health=policy) as pool:
        for _ in range(deaths):
            served = pool.members[0].service_s
            await until(lambda at=served: pool.members[0].service_s > at + 0.06)
            await server.kill()
            await until(lambda: not pool.members[0].alive)
            await until(lambda: pool.members[0].routable)
        assert pool.failure is None


async def test_time_that_a_server_takes_to_start_forgives_nothing():
    server = FakeServer(tail="cannot allocate")

    async def restart(url):
        await asyncio.sleep(0.06)
        raise WeightSyncError("it did not come up")

    policy = replace(FAST, max_restarts=2, forgiven_after_s=0.05)
    async with pool_of(server, restore=Publisher([server]), restart=restart, health=policy) as pool:
        await server.kill()
        with pytest.raises(ServersLostError, match="it failed 3 times within") as error:
            await pool.generate([1], Sampling())
    assert "it did not come up" in str(error.value)
    assert "cannot allocate" in str(error.value)


@pytest.mark.parametrize("kind", ["hang", "drip", "drip headers"])
async def test_a_request_that_a_server_never_answers_goes_to_another(kind, caplog):
    servers = [FakeServer(faults=[Fault("/generate", kind, times=9)]), FakeServer(seed=1)]
    publisher = Publisher(servers)
    async with pool_of(*servers, limits=QUICK, restore=publisher) as pool:
        completion = await pool.generate([1], Sampling(max_new_tokens=8))
        assert len(completion.token_ids) == 8
        await until(lambda: publisher.restored)
    (line,) = lines(caplog, "is out, and proved again")
    assert servers[0].url in line
    assert "it did not answer a request within" in line


async def test_requests_that_travel_together_are_called_back_together():
    servers = [FakeServer(faults=[Fault("/generate", "hang")]), FakeServer(seed=1)]
    limits = replace(QUICK, together=True)
    async with pool_of(*servers, limits=limits, restore=Publisher(servers)) as pool:
        asked = [pool.generate([1], Sampling(max_new_tokens=8), group_key=0) for _ in range(4)]
        assert [len(c.token_ids) for c in await asyncio.gather(*asked)] == [8] * 4


async def test_a_server_that_answers_nothing_but_its_proofs_is_not_forgiven_for_ever(caplog):
    servers = [FakeServer(faults=[Fault("/generate", "hang", times=10**6)]), FakeServer(seed=1)]
    # What it is given takes longer to be found out than a fault takes to be forgotten.
    policy = replace(FAST, max_restarts=2, forgiven_after_s=0.05)
    publisher = Publisher(servers)
    async with pool_of(*servers, limits=QUICK, restore=publisher, health=policy) as pool:
        while not lines(caplog, "is lost"):
            await asyncio.gather(*(pool.generate([1], Sampling(max_new_tokens=8)) for _ in "ab"))
        assert pool.failure is None
    (line,) = lines(caplog, "is lost")
    assert servers[0].url in line
    assert "it failed 3 times" in line


async def test_a_server_that_is_merely_slow_gives_late_requests_back_and_nothing_is_lost(caplog):
    server = FakeServer(token_delay_s=0.03)
    async with pool_of(server, limits=QUICK, restore=Publisher([server])) as pool:
        completion = await pool.generate([1], Sampling(max_new_tokens=30))
    assert len(completion.token_ids) == 30
    assert completion.num_interruptions > 0
    pieces = [len(request["input_ids"]) for request in server.requests]
    assert pieces == sorted(set(pieces))
    assert set(completion.versions) == {0}
    assert not lines(caplog, "is out")


async def test_a_server_that_gives_requests_back_without_a_token_is_found_out(caplog):
    def empty(reply):
        reply["output_ids"], reply["meta_info"]["output_token_logprobs"] = [], []
        reply["meta_info"]["weight_versions"] = []

    servers = [FakeServer(token_delay_s=0.05, spoil=empty), FakeServer(seed=1)]
    async with pool_of(*servers, limits=QUICK, restore=Publisher(servers)) as pool:
        assert len((await pool.generate([1], Sampling(max_new_tokens=9))).token_ids) == 9
        await until(lambda: pool.members[0].state is not MemberState.CLEAN)
        await until(lambda: lines(caplog, "is out"))
    (line,) = lines(caplog, "is out, and proved again")
    assert "gave a request back after 0 s without a token, and has answered no other" in line


async def test_a_server_that_stands_still_for_an_update_is_not_late():
    server = FakeServer(token_delay_s=0.001)
    async with pool_of(server, limits=QUICK) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=60)))
        await until(lambda: server.running)
        await pool.interrupt(mode="retract")
        await asyncio.sleep(0.4)
        assert pool.members[0].late is None
        await pool.resume()
        assert len((await generating).token_ids) == 60
    assert "/abort_request" not in server.calls


async def test_a_server_that_fails_every_request_and_is_healthy_is_proved_again():
    servers = [FakeServer(faults=[Fault("/generate", "error", times=99)]), FakeServer(seed=1)]
    publisher = Publisher(servers)
    async with pool_of(*servers, restore=publisher) as pool:
        while not publisher.restored:
            await pool.generate([1], Sampling(max_new_tokens=2))
            await until(lambda: all(m.routable or m.state != "clean" for m in pool.members))
    assert publisher.restored[0] == 0


async def test_a_server_that_lies_again_and_again_is_lost_and_no_update_brings_it_back():
    servers = [FakeServer(spoil=lambda reply: reply["output_ids"].append(1)), FakeServer(seed=1)]
    publisher = Publisher(servers)
    policy = replace(FAST, max_restarts=2)
    async with pool_of(*servers, restore=publisher, health=policy) as pool:
        first = pool.members[0]
        while pool.members[0].alive:
            await pool.generate([1], Sampling(max_new_tokens=2))
            await until(lambda: first.routable or first.state is MemberState.DEAD)
        assert publisher.restored == [0, 0]
        assert "sent 3 tokens where 2 were asked for" in first.reason
        assert pool.failure is None
