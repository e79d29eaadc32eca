import asyncio
import itertools
import random
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from lightning_grpo.errors import ConfigError, ServersLostError, WeightSyncError
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.health import HealthPolicy, check_memory_release
from lightning_grpo.serving.pool import Listing, PoolLimits, ServerPool
from lightning_grpo.serving.server import MemberState, ServerHandle
from lightning_grpo.types import Sampling
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.proof import Probe, Rounding, SentScores, TrainerFailedError, promised
from lightning_grpo.weights.publisher import ATTEMPTS, SyncSettings, WeightPublisher
from lightning_grpo.weights.transport import DiskTransport, Place
from tests.fakes.server import FakeServer, Fault, make_table, table_scores, until

pytestmark = pytest.mark.anyio

FAST = HealthPolicy(interval_s=0.02, check_timeout_s=2.0, failed_checks=2)
PROBE = Probe(((1, 2, 3, 4), (5, 6, 7)))
TIMEOUT_S = 3.0


@pytest.fixture(params=["disk", "group"])
def transport(request):
    if request.param == "disk":
        return DiskTransport()
    return ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)


def snapshot(version):
    # A second tensor, so that small buckets are several.
    return {"other": torch.zeros(8, 8), "table": torch.tensor(make_table(version))}


def expected(version):
    # Through fp32, as the servers receive them.
    table = torch.tensor(make_table(version)).tolist()
    return SentScores([table_scores(table, list(ids)) for ids in PROBE.sequences])


@asynccontextmanager
async def fleet(
    tmp_path, transport, *servers, probe=PROBE, timeout_s=TIMEOUT_S, kind=ServerPool, **options
):
    (tmp_path / "base").mkdir(exist_ok=True)
    async with asyncio.timeout(40):
        for server in servers:
            await server.start()
        needs = options.pop("requirements", Requirements("run"))
        pool = kind(servers, needs, lambda ids: "", **{"health": FAST, **options})
        await pool.start()
        transport.bind(Place(tmp_path / "run", tmp_path / "base", bucket_bytes=512))
        settings = SyncSettings(
            request_timeout_s=timeout_s, gather_timeout_s=timeout_s, recovery_timeout_s=10
        )
        publisher = WeightPublisher(pool, transport, "run", probe, settings)
        pool.on_restart(publisher.restore)
        pool.on_leave(publisher.part)
        try:
            yield pool, publisher
        finally:
            await publisher.close()
            await pool.close()
            for server in servers:
                await server.kill()


async def publish(publisher, version):
    return await publisher.publish(snapshot(version), version, expected(version))


def holds(server, version):
    return torch.equal(torch.tensor(server.table), torch.tensor(make_table(version)))


async def test_a_publish_brings_weights_and_label_to_every_server(tmp_path, transport):
    servers = [FakeServer(), FakeServer()]
    async with fleet(tmp_path, transport, *servers) as (pool, publisher):
        for version in (1, 2, 3):
            report = await publish(publisher, version)
            assert all(holds(s, version) for s in servers)
            assert [s.label for s in servers] == [f"run:{version}"] * 2
            assert [m.version for m in pool.members] == [version] * 2
            assert not any(s.paused for s in servers)
            assert report.probe_diff < 1e-5
            assert not report.failures
        assert report.num_bytes >= 4 * (16 * 16 + 64)
        assert report.probe_change > 0.1
        assert {"prepare", "interrupt", "flush", "update", "continue", "probe"} <= set(
            report.seconds
        )
        assert report.paused_s > 0
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert set(completion.versions) == {3}


class CountingPool(ServerPool):
    """Counts how often requests were let go on, and how many servers were behind each time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.behind = []

    async def resume(self):
        self.behind.append(sum(m.state is not MemberState.CLEAN for m in self.members))
        await super().resume()


async def test_requests_go_on_when_a_server_is_ready_and_behind_the_last_one_once(tmp_path):
    # What was held back takes the loop milliseconds to send, and the trainer waits for the report.
    servers = [FakeServer(), FakeServer(), FakeServer()]
    async with fleet(tmp_path, DiskTransport(), *servers, kind=CountingPool) as (pool, publisher):
        await publish(publisher, 1)
        pool.behind.clear()
        await publish(publisher, 2)
        assert pool.behind == [2, 1, 0]


async def test_the_order_of_one_publish(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server) as (_, publisher):
        server.calls.clear()
        await publish(publisher, 1)
    calls = [c for c in server.calls if c not in ("/health", "/model_info")][:6]
    assert calls[:3] == ["/pause_generation", "/flush_cache", "/update_weights_from_disk"]
    assert sorted(calls[3:]) == ["/continue_generation", "/generate", "/generate"]
    assert calls[3] == "/generate"  # before what the server held while it was paused


async def test_servers_stop_while_the_weights_are_gathered(tmp_path):
    server = FakeServer()
    transport = ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    async with fleet(tmp_path, transport, server) as (_, publisher):
        weights = Future()
        publishing = asyncio.create_task(publisher.publish(weights, 1, expected(1)))
        await until(lambda: server.paused)
        assert not publishing.done()
        weights.set_result(snapshot(1))
        report = await publishing
        assert holds(server, 1)
        assert not server.paused
        assert {"gather", "prepare"} <= set(report.seconds)


async def test_servers_work_on_while_the_weights_are_written_to_disk(tmp_path):
    server = FakeServer()
    stopped_before = []

    class Watched(DiskTransport):
        def prepare(self, weights, version):
            stopped_before.append(server.paused)
            return super().prepare(weights, version)

    async with fleet(tmp_path, Watched(), server) as (_, publisher):
        await publish(publisher, 1)
        assert holds(server, 1)
    assert stopped_before == [False]


@pytest.mark.parametrize("failure", ["raised", "late"])
async def test_weights_that_do_not_come_leave_the_servers_at_work_on_the_ones_they_have(
    tmp_path, transport, failure
):
    server = FakeServer()
    async with fleet(tmp_path, transport, server, timeout_s=0.5) as (pool, publisher):
        await publish(publisher, 1)
        weights = Future()
        if failure == "raised":
            weights.set_exception(ArithmeticError("a gather that failed"))
        with pytest.raises(ArithmeticError if failure == "raised" else WeightSyncError):
            await publisher.publish(weights, 2, expected(2))
        assert not server.paused
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert set(completion.versions) == {1}
        await publish(publisher, 3)
        assert holds(server, 3)


async def test_a_server_without_a_prefix_cache_has_none_to_flush(tmp_path):
    server = FakeServer(info={"disable_radix_cache": True})
    async with fleet(tmp_path, DiskTransport(), server) as (_, publisher):
        report = await publish(publisher, 1)
        assert holds(server, 1)
        assert "flush" not in report.seconds
    assert "/flush_cache" not in server.calls


async def test_the_trainers_scores_may_come_while_the_weights_travel(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server) as (pool, publisher):
        scores = Future()
        publishing = asyncio.create_task(publisher.publish(snapshot(1), 1, scores))
        await until(lambda: "/generate" in server.calls)
        assert pool.members[0].state is MemberState.UPDATING
        scores.set_result(expected(1))
        report = await publishing
        assert pool.members[0].state is MemberState.CLEAN
        assert report.probe_diff < 1e-5


async def test_a_trainer_that_can_not_score_ends_the_publish_and_no_server_is_to_blame(
    tmp_path, transport
):
    servers = [FakeServer(), FakeServer()]
    async with fleet(tmp_path, transport, *servers) as (pool, publisher):
        scores = Future()
        publishing = asyncio.create_task(publisher.publish(snapshot(1), 1, scores))
        # One is behind the other when the news comes; it is not left in the middle of a transfer.
        await until(lambda: any(s.label == "run:1" for s in servers))
        with pytest.raises(WeightSyncError), promised(scores):
            raise WeightSyncError("not finite")
        with pytest.raises(TrainerFailedError, match="not finite"):
            await publishing
        assert all(holds(s, 1) for s in servers)
        for server in servers:
            assert server.calls.count("/pause_generation") == 1  # no other attempt
        assert not any(m.state is MemberState.CLEAN for m in pool.members)


async def test_closing_waits_for_a_publish_that_is_under_way(tmp_path, transport):
    server = FakeServer()
    async with fleet(tmp_path, transport, server) as (_, publisher):
        scores = Future()
        publishing = asyncio.create_task(publisher.publish(snapshot(1), 1, scores))
        await until(lambda: server.label == "run:1")
        closing = asyncio.create_task(publisher.close())
        await asyncio.sleep(0.05)
        scores.set_result(expected(1))
        await closing
        assert (await publishing).updated == [server.url]
        assert server.label == "default"
        with pytest.raises(WeightSyncError, match="was closed"):
            await publish(publisher, 2)
        assert not holds(server, 2)


async def test_large_weights_have_the_time_that_their_bytes_take_beyond_the_deadline(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server, timeout_s=0.3) as (_, publisher):
        weights = Future()
        asyncio.get_running_loop().call_later(0.8, weights.set_result, snapshot(1))
        report = await publisher.publish(weights, 1, expected(1), num_bytes=10**9)
        assert report.updated == [server.url]
        assert report.seconds["gather"] > 0.3
    settings = SyncSettings()
    assert settings.gather_s(0) == settings.transfer_s(0) == 60.0
    assert settings.transfer_s(140 * 10**9) == 60.0 + 700.0


async def test_closing_breaks_off_a_publish_that_hangs_and_leaves_no_thread(tmp_path):
    server = FakeServer(faults=[Fault("/update_weights_from_distributed", "hang")])
    transport = ProcessGroupTransport("gloo", timeout_s=100.0)
    async with fleet(tmp_path, transport, server, timeout_s=100.0) as (_, publisher):
        publishing = asyncio.create_task(publish(publisher, 1))
        await until(lambda: "/update_weights_from_distributed" in server.calls)
        await publisher.close()
        with pytest.raises(WeightSyncError, match="was closed"):
            await publishing
        assert "/destroy_weights_update_group" in server.calls


async def test_scores_that_do_not_come_in_time_leave_the_server_unused(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server, timeout_s=0.3) as (pool, publisher):
        scores = Future()
        with pytest.raises(ServersLostError):
            await publisher.publish(snapshot(1), 1, scores)
        assert pool.members[0].state is not MemberState.CLEAN
        assert not scores.cancelled()


async def test_servers_that_gave_their_memory_back_take_it_for_the_next_publish(tmp_path):
    server = FakeServer(token_delay_s=0.005)
    async with fleet(tmp_path, DiskTransport(), server) as (pool, publisher):
        await publish(publisher, 1)
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: server.running)
        await publisher.release_memory()
        assert server.released
        assert not pool.members[0].routable
        late = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=2)))
        report = await publish(publisher, 2)
        assert not server.released
        assert holds(server, 2)
        assert "resume" in report.seconds
        completion = await generating
        assert completion.num_interruptions == 1
        assert set(completion.versions) == {1, 2}
        assert set((await late).versions) == {2}


async def test_servers_that_can_not_give_memory_back_are_refused(tmp_path):
    async with fleet(tmp_path, DiskTransport(), FakeServer()) as (pool, _):
        with pytest.raises(ConfigError, match="enable-memory-saver"):
            check_memory_release(pool.members)
    able = FakeServer(info={"enable_memory_saver": True})
    async with fleet(tmp_path, DiskTransport(), able) as (pool, _):
        check_memory_release(pool.members)


async def test_a_health_check_held_by_the_pause_does_not_hold_up_the_update(tmp_path):
    server = FakeServer(check_before_pause=True)
    async with fleet(tmp_path, DiskTransport(), server) as (_, publisher):
        report = await publish(publisher, 1)
        assert not report.failures
        assert holds(server, 1)
    assert server.calls.count("/pause_generation") == 1


@pytest.mark.parametrize(("version", "session"), [("0.5.19", False), ("0.5.23", True)])
async def test_a_session_frames_tensor_updates_where_the_version_wants_it(
    tmp_path, version, session
):
    server = FakeServer(version=version)
    transport = ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    async with fleet(tmp_path, transport, server) as (_, publisher):
        await publish(publisher, 1)
        assert holds(server, 1)
    assert ("/begin_weight_update" in server.calls) is session
    assert ("/end_weight_update" in server.calls) is session


async def test_the_label_travels_with_the_last_bucket_only(tmp_path):
    server = FakeServer()
    labels = []
    transport = ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    async with fleet(tmp_path, transport, server) as (_, publisher):
        inner = server._update_weights_from_distributed

        async def watched(request):
            labels.append((await request.json()).get("weight_version"))
            return await inner(request)

        route = next(
            r
            for r in server._runner.app.router.routes()
            if r.resource.canonical == "/update_weights_from_distributed"
        )
        route._handler = watched
        await publish(publisher, 1)
    assert labels == [None, "run:1"]


PHASES = {
    "disk": [
        "/pause_generation",
        "/flush_cache",
        "/update_weights_from_disk",
        "/continue_generation",
        "/generate",
    ],
    "group": [
        "/pause_generation",
        "/flush_cache",
        "/init_weights_update_group",
        "/update_weights_from_distributed",
        "/continue_generation",
        "/generate",
    ],
}


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind, paths in PHASES.items() for path in paths],
)
async def test_a_server_that_dies_in_any_phase_leaves_the_other_this_and_the_next_sync(
    tmp_path, kind, path
):
    transport = (
        DiskTransport() if kind == "disk" else ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    )
    doomed, other = FakeServer(), FakeServer()
    async with fleet(tmp_path, transport, doomed, other) as (pool, publisher):
        doomed.faults.append(Fault(path, "die"))
        report = await publish(publisher, 1)
        assert doomed._runner is None
        assert holds(other, 1)
        assert report.updated == [other.url]
        generated = len(doomed.requests)
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert set(completion.versions) == {1}
        await publish(publisher, 2)
        assert holds(other, 2)
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert set(completion.versions) == {2}
        assert len(doomed.requests) == generated
        assert pool.members[0].state is not MemberState.CLEAN


@pytest.mark.parametrize("fault", ["error", "refuse", "drop"])
async def test_a_passing_fault_is_overcome_by_another_attempt(tmp_path, transport, fault):
    path = (
        "/update_weights_from_disk"
        if isinstance(transport, DiskTransport)
        else "/update_weights_from_distributed"
    )
    server = FakeServer(faults=[Fault(path, fault)])
    async with fleet(tmp_path, transport, server) as (pool, publisher):
        report = await publish(publisher, 1)
        assert holds(server, 1)
        assert not report.failures
        assert pool.members[0].version == 1


async def test_a_hanging_update_ends_at_its_deadline_without_another_and_the_other_server_goes_on(
    tmp_path, transport
):
    path = (
        "/update_weights_from_disk"
        if isinstance(transport, DiskTransport)
        else "/update_weights_from_distributed"
    )
    hanging, other = FakeServer(faults=[Fault(path, "hang")]), FakeServer()
    # Nobody but the next publish brings it back.
    calm = {"timeout_s": 0.5, "health": replace(FAST, interval_s=60.0)}
    async with fleet(tmp_path, transport, hanging, other, **calm) as (pool, publisher):
        report = await publish(publisher, 1)
        assert report.updated == [other.url]
        assert "0.5 s" in report.failures[hanging.url]
        assert pool.members[0].state is MemberState.DIRTY
        report = await publish(publisher, 2)
        assert len(report.updated) == 2
        assert holds(hanging, 2)


async def test_an_update_that_says_no_but_happened_is_resolved_by_the_probe(tmp_path, transport):
    path = (
        "/update_weights_from_disk"
        if isinstance(transport, DiskTransport)
        else "/update_weights_from_distributed"
    )
    server = FakeServer(faults=[Fault(path, "lie", times=1)])
    # One bucket, so that the lie is about the whole update.
    async with fleet(tmp_path, transport, server) as (pool, publisher):
        if isinstance(transport, ProcessGroupTransport):
            transport.bind(Place(tmp_path / "run", tmp_path / "base", bucket_bytes=1 << 20))
        report = await publish(publisher, 1)
        assert holds(server, 1)
        assert server.label == "run:1"
        assert not report.failures
        assert server.calls.count(path) == 1
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert set(completion.versions) == {1}


async def test_an_update_that_says_yes_but_did_not_happen_makes_the_server_dirty(tmp_path):
    server = FakeServer(faults=[Fault("/update_weights_from_disk", "ignore", times=99)])
    other = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server, other) as (pool, publisher):
        report = await publish(publisher, 1)
        assert "holds other weights than were sent as version 1" in report.failures[server.url]
        assert server.paused
        assert pool.members[0].state is MemberState.DIRTY
        before = len(server.requests)
        await asyncio.gather(*(pool.generate([1], Sampling(max_new_tokens=4)) for _ in range(8)))
        assert len(server.requests) == before


async def test_when_no_server_takes_the_version_and_none_is_restarted_the_run_ends(tmp_path):
    server = FakeServer(faults=[Fault("/update_weights_from_disk", "error", times=99)])
    options = {"health": replace(FAST, patience_s=0.3)}
    async with fleet(tmp_path, DiskTransport(), server, **options) as (_, publisher):
        with pytest.raises(ServersLostError, match="answered 500"):
            await publish(publisher, 1)


@pytest.mark.parametrize("path", PHASES["group"])
async def test_the_only_server_dies_in_any_phase_is_restarted_and_gets_the_version(tmp_path, path):
    server = FakeServer(token_delay_s=0.002)

    async def restart(url):
        server.port = 0
        server.table = make_table(0)
        server.label = "default"
        server.unpaused.set()
        server.in_session = False
        await server.start()
        return server

    transport = ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    async with fleet(tmp_path, transport, server, restart=restart) as (pool, publisher):
        await publish(publisher, 1)
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=200)))
        while not server.running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        server.faults.append(Fault(path, "die"))
        if path == "/init_weights_update_group":
            await transport.abandon(pool.members[0])
        await publish(publisher, 2)
        assert holds(server, 2)
        assert server.label == "run:2"
        completion = await generating
        assert len(completion.token_ids) == 200
        assert set(completion.versions) <= {1, 2}
        await publish(publisher, 3)
        assert holds(server, 3)


async def test_completions_keep_exact_versions_through_many_publishes(tmp_path, transport):
    servers = [FakeServer(token_delay_s=0.001), FakeServer(token_delay_s=0.001)]
    async with fleet(tmp_path, transport, *servers) as (pool, publisher):
        generating = [
            asyncio.create_task(pool.generate([1, n], Sampling(max_new_tokens=150)))
            for n in range(6)
        ]
        await publish(publisher, 0)
        for version in range(1, 6):
            await asyncio.sleep(0.02)
            await publish(publisher, version)
        completions = await asyncio.gather(*generating)
    tables = {v: torch.tensor(make_table(v)).tolist() for v in range(6)}
    spanning = 0
    for n, completion in enumerate(completions):
        ids = [1, n, *completion.token_ids]
        pairs = list(itertools.pairwise(ids))[1:]
        for (a, b), version, logprob in zip(
            pairs, completion.versions, completion.logprobs, strict=True
        ):
            assert logprob == pytest.approx(table_scores(tables[version], [a, b])[1], abs=1e-5)
        spanning += len(set(completion.versions)) > 1
    assert spanning > 0


async def test_servers_that_hold_the_folders_weights_are_adopted_without_a_transfer(tmp_path):
    table = torch.tensor(make_table(0)).tolist()
    servers = [FakeServer(table=table), FakeServer(table=table)]
    async with fleet(tmp_path, DiskTransport(), *servers) as (pool, publisher):
        servers[0].unpaused.clear()  # as a run leaves it that crashed during an update
        assert await publisher.adopt(0, expected(0))
        assert [s.label for s in servers] == ["run:0", "run:0"]
        assert "/update_weights_from_disk" not in servers[0].calls
        completion = await pool.generate([1], Sampling(max_new_tokens=2))
        assert set(completion.versions) == {0}
        servers[1].table = make_table(9)
        assert not await publisher.adopt(0, expected(0))


async def test_a_server_that_scores_to_the_last_bit_as_before_did_not_change(tmp_path):
    # In a lower precision the limit is wide: staying the same is what gives it away.
    close = torch.tensor(make_table(1)) + 0.1 * torch.tensor(make_table(7))
    server = FakeServer(info={"dtype": "bfloat16"})
    async with fleet(tmp_path, DiskTransport(), server) as (_, publisher):
        rounding = Rounding({"bfloat16": 0.05})
        noisy = [[x + 0.05 for x in row] for row in expected(1).scores]
        await publisher.publish(snapshot(1), 1, SentScores(noisy, rounding=rounding))
        server.faults.append(Fault("/update_weights_from_disk", "ignore", times=99))
        scores = [table_scores(close.tolist(), list(ids)) for ids in PROBE.sequences]
        with pytest.raises((WeightSyncError, ServersLostError), match="kept old weights"):
            await publisher.publish({"table": close}, 2, SentScores(scores, rounding=rounding))


async def test_the_first_proof_of_a_server_is_thorough_and_later_ones_are_not(tmp_path):
    probe = Probe(PROBE.sequences, thorough=((7, 8, 9, 10, 11),))
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server, probe=probe) as (_, publisher):
        table = torch.tensor(make_table(1)).tolist()
        long = table_scores(table, list(probe.thorough[0]))
        wrong = SentScores([*expected(1).scores, [x - 0.1 for x in long]])
        with pytest.raises((WeightSyncError, ServersLostError), match="holds other weights"):
            await publisher.publish(snapshot(1), 1, wrong)
    async with fleet(tmp_path, DiskTransport(), server, probe=probe) as (_, publisher):
        right = SentScores([*expected(1).scores, long])
        await publisher.publish(snapshot(1), 1, right)
        server.calls.clear()
        await publish(publisher, 2)
        assert server.calls.count("/generate") == len(PROBE.sequences)


async def test_weights_may_be_written_over_once_no_server_is_sent_them_any_more(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server) as (_, publisher):
        first, second = Future(), Future()
        publishing = asyncio.create_task(publisher.publish(snapshot(1), 1, first))
        await until(lambda: server.label == "run:1")
        turn = Future()
        waiting = asyncio.create_task(publisher.publish(second, 2, expected(2), turn))
        await asyncio.sleep(0.05)
        assert not turn.done()
        first.set_result(expected(1))
        await publishing
        await until(turn.done)
        second.set_result(snapshot(2))
        assert (await waiting).updated == [server.url]


async def test_a_turn_that_never_comes_is_told(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server) as (_, publisher):
        await publisher.close()
        turn = Future()
        with pytest.raises(WeightSyncError, match="was closed"):
            await publisher.publish(snapshot(1), 1, expected(1), turn)
        assert isinstance(turn.exception(), TrainerFailedError)


async def test_without_a_probe_a_refusal_stands(tmp_path):
    server = FakeServer(faults=[Fault("/update_weights_from_disk", "refuse", times=99)])
    async with fleet(tmp_path, DiskTransport(), server, probe=None) as (_, publisher):
        with pytest.raises(ServersLostError, match="refused"):
            await publish(publisher, 1)
    server.faults.clear()
    async with fleet(tmp_path, DiskTransport(), server, probe=None) as (_, publisher):
        report = await publish(publisher, 2)
        assert not report.failures
        assert report.updated == [server.url]
        assert report.probe_diff is None


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind, paths in PHASES.items() for path in paths],
)
async def test_a_server_cut_off_in_any_phase_of_an_update_comes_back_with_the_version(
    tmp_path, kind, path, others
):
    transport = (
        DiskTransport() if kind == "disk" else ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    )
    cut, *rest = servers = [FakeServer(token_delay_s=0.002) for _ in range(1 + others)]
    async with fleet(tmp_path, transport, *servers) as (pool, publisher):
        await publish(publisher, 1)
        generating = [
            asyncio.create_task(pool.generate([1, n], Sampling(max_new_tokens=100)))
            for n in range(4)
        ]
        await until(lambda: all(server.running for server in servers))
        cut.faults.append(Fault(path, "die"))
        if path == "/init_weights_update_group":
            await transport.abandon(pool.members[0])
        publishing = asyncio.create_task(publish(publisher, 2))
        await until(lambda: cut._runner is None)
        await asyncio.sleep(0.3)
        await cut.start()
        report = await publishing
        assert set(report.updated) >= {server.url for server in rest}
        await until(lambda: all(m.routable for m in pool.members))
        assert [m.version for m in pool.members] == [2] * len(servers)
        assert all(holds(server, 2) and not server.paused for server in servers)
        for completion in await asyncio.gather(*generating):
            assert len(completion.token_ids) == 100
            assert set(completion.versions) <= {1, 2}
        assert len((await publish(publisher, 3)).updated) == len(servers)


async def test_a_server_cut_off_while_its_memory_was_given_back_takes_it_again(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server) as (pool, publisher):
        await publish(publisher, 1)
        await publisher.release_memory()
        assert server.released
        await server.kill()
        publishing = asyncio.create_task(publish(publisher, 2))
        await until(lambda: not pool.members[0].alive or pool.members[0].state == "dirty")
        await server.start()
        await publishing
        await until(lambda: pool.members[0].routable)
        assert not server.released
        assert holds(server, 2)


async def test_a_server_that_started_anew_while_it_had_no_memory_is_not_told_to_take_it(tmp_path):
    server = FakeServer()
    async with fleet(tmp_path, DiskTransport(), server) as (pool, publisher):
        await publish(publisher, 1)
        await publisher.release_memory()
        await server.kill()
        server.released, server.label = False, "default"
        server.unpaused.set()
        publishing = asyncio.create_task(publish(publisher, 2))
        await until(lambda: not pool.members[0].alive or pool.members[0].state == "dirty")
        await server.start()
        await publishing
        await until(lambda: pool.members[0].routable)
        assert holds(server, 2)


async def test_a_server_that_kept_old_weights_is_not_believed_because_it_was_out(tmp_path):
    close = torch.tensor(make_table(1)) + 0.1 * torch.tensor(make_table(7))
    server = FakeServer(info={"dtype": "bfloat16"})
    async with fleet(tmp_path, DiskTransport(), server) as (_, publisher):
        rounding = Rounding({"bfloat16": 0.05})
        noisy = [[x + 0.05 for x in row] for row in expected(1).scores]
        await publisher.publish(snapshot(1), 1, SentScores(noisy, rounding=rounding))
        server.faults.append(Fault("/update_weights_from_disk", "ignore", times=99))
        scores = [table_scores(close.tolist(), list(ids)) for ids in PROBE.sequences]
        with pytest.raises(ServersLostError, match=r"failed its proof 3 times .*kept old weights"):
            await publisher.publish({"table": close}, 2, SentScores(scores, rounding=rounding))


async def test_a_session_left_open_by_a_crashed_run_is_closed_first(tmp_path):
    server = FakeServer(version="0.5.23", faults=[Fault("/begin_weight_update", "refuse")])
    transport = ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    async with fleet(tmp_path, transport, server) as (_, publisher):
        report = await publish(publisher, 1)
        assert report.updated == [server.url]
        assert holds(server, 1)
        assert not server.in_session


async def test_a_server_that_comes_back_during_a_publish_is_brought_by_its_restart_alone(tmp_path):
    servers = [FakeServer(), FakeServer()]
    back = servers[1]

    async def restart(url):
        back.table, back.label = make_table(0), "default"
        back.unpaused.set()
        back.calls.clear()
        await back.start()
        return back

    transport = ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    options = {"restart": restart, "timeout_s": 30.0}
    async with fleet(tmp_path, transport, *servers, **options) as (pool, publisher):
        await publish(publisher, 1)
        gathered = Future()
        publishing = asyncio.create_task(publisher.publish(gathered, 2, expected(2)))
        await until(lambda: all(server.paused for server in servers))
        await back.kill()
        await until(lambda: pool.members[1].state is MemberState.DIRTY)
        gathered.set_result(snapshot(2))
        report = await publishing
        assert report.updated == [servers[0].url]
        assert not report.failures
        await until(lambda: pool.members[1].routable)
        assert holds(back, 2)
        # A weight group of the process before would end SGLang.
        calls = back.calls
        assert calls.count("/init_weights_update_group") == 1
        update = "/update_weights_from_distributed"
        assert calls.index("/init_weights_update_group") < calls.index(update)


async def test_a_session_that_breaks_off_is_closed_before_the_next_attempt(tmp_path):
    faults = [Fault("/update_weights_from_distributed", "error", ATTEMPTS - 1)]
    server = FakeServer(version="0.5.23", faults=faults)
    transport = ProcessGroupTransport("gloo", timeout_s=TIMEOUT_S)
    async with fleet(tmp_path, transport, server) as (_, publisher):
        report = await publish(publisher, 1)
        assert report.updated == [server.url]
        assert holds(server, 1)


async def test_closing_gives_the_weights_back_to_nobodys_name(tmp_path, transport):
    server = FakeServer()
    async with fleet(tmp_path, transport, server) as (_, publisher):
        await publish(publisher, 1)
        await publisher.close()
        assert server.label == "default"


# -- servers that come and go ----------------------------------------------------------------------


@asynccontextmanager
async def listed_fleet(tmp_path, transport, *servers, started=(), **options):
    """A fleet of servers that a list names, and the list; `started` are not on it yet."""
    urls = []

    async def look():
        return [ServerHandle(url) for url in urls]

    for server in started:
        await server.start()
    options["listing"] = Listing("servers.txt", look, 0.02)
    try:
        async with fleet(tmp_path, transport, *servers, **options) as (pool, publisher):
            urls += [server.url for server in servers]
            yield pool, publisher, urls
    finally:
        for server in started:
            await server.kill()


def ask(pool, num_tokens=100, prompts=4):
    sampling = Sampling(max_new_tokens=num_tokens)
    return [asyncio.create_task(pool.generate([1, n], sampling)) for n in range(prompts)]


def urls_of(pool):
    return [member.url for member in pool.members]


async def test_a_server_that_appears_is_brought_to_the_weights_and_used_like_the_others(
    tmp_path, transport, caplog
):
    first, later = FakeServer(token_delay_s=0.002), FakeServer(token_delay_s=0.002)
    # It served this run before, and was paused when it was cut off.
    later.table, later.label = make_table(9), "run:0"
    later.unpaused.clear()
    async with listed_fleet(tmp_path, transport, first, started=[later]) as (pool, publisher, urls):
        await publish(publisher, 1)
        urls.append(later.url)
        await until(lambda: len(pool.members) == 2)
        assert holds(later, 1)
        assert not later.paused
        assert later.label == "run:1"
        assert [m.describe() for m in pool.members] == [f"{s.url} clean(1)" for s in (first, later)]
        generating = ask(pool, 20, prompts=8)
        await until(lambda: first.running and later.running)
        assert sorted((await publish(publisher, 2)).updated) == sorted([first.url, later.url])
        assert holds(later, 2)
        assert all(len(c.token_ids) == 20 for c in await asyncio.gather(*generating))
    assert (
        f"server 1 has joined (servers.txt names it) after 0 s: {later.url} clean(1)" in caplog.text
    )
    assert later.label == "default"


async def test_a_server_that_leaves_hands_on_its_requests_and_belongs_to_nobody(
    tmp_path, transport, caplog
):
    stays, leaves = FakeServer(token_delay_s=0.002), FakeServer(token_delay_s=0.002)
    async with listed_fleet(tmp_path, transport, stays, leaves) as (pool, publisher, urls):
        await publish(publisher, 1)
        generating = ask(pool)
        await until(lambda: stays.running and leaves.running)
        held = len(leaves.running)
        await asyncio.sleep(0.05)
        urls.remove(leaves.url)
        await until(lambda: pool.known[1].state == "dead")
        completions = await asyncio.gather(*generating)
        assert all(len(c.token_ids) == 100 for c in completions)
        assert sum(c.num_interruptions for c in completions) == held  # with their tokens
        assert (leaves.label, leaves.paused, leaves.group) == ("default", False, None)
        assert (await publish(publisher, 2)).updated == [stays.url]
        assert holds(leaves, 1)
        urls.append(leaves.url)  # and is taken back as if it had never been there
        await until(lambda: len(pool.members) == 2)
        assert holds(leaves, 2)
        assert [m.slot for m in pool.members] == [0, 1]
    assert f"server 1 has left (servers.txt names it no more), its {held} requests" in caplog.text


async def test_a_server_that_leaves_costs_a_request_no_failover_and_deterministically_no_token(
    tmp_path,
):
    servers = stays, leaves = [FakeServer(token_delay_s=0.002) for _ in range(2)]
    options = {
        "limits": PoolLimits(max_failovers=0),
        "requirements": Requirements("run", deterministic=True),
    }
    for server in servers:
        server.info["enable_deterministic_inference"] = True
    fleet_of_two = listed_fleet(tmp_path, DiskTransport(), *servers, **options)
    async with fleet_of_two as (pool, publisher, urls):
        await publish(publisher, 1)
        generating = ask(pool)
        await until(lambda: stays.running and leaves.running)
        urls.remove(leaves.url)
        completions = await asyncio.gather(*generating)
        assert [(len(c.token_ids), c.num_interruptions) for c in completions] == [(100, 0)] * 4
        assert "/abort_request" not in leaves.calls
        assert leaves.label == "default"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"model": {"vocab_size": 99}}, "with a vocabulary of 99, the trainer's model has 16"),
        ({"tokens": [1, 2]}, "has another tokenizer"),
        ({"label": "other:7"}, "carries the weights 'other:7' of another run"),
        ({"version": "0.4.9"}, "runs SGLang 0.4.9; at least 0.5.17 is needed"),
    ],
)
async def test_a_server_that_does_not_fit_is_named_and_not_used_until_it_does(
    tmp_path, caplog, broken, message
):
    first, later = FakeServer(tokens=[5, 6]), FakeServer(**{"tokens": [5, 6], **broken})
    needs = Requirements("run", vocab_size=16, sample=("text", (5, 6)))
    options = {"started": [later], "requirements": needs}
    fleet_of_one = listed_fleet(tmp_path, DiskTransport(), first, **options)
    async with fleet_of_one as (pool, publisher, urls):
        await publish(publisher, 1)
        urls.append(later.url)
        await until(lambda: message in caplog.text)
        await publish(publisher, 2)
        assert urls_of(pool) == [first.url]
        assert "/update_weights_from_disk" not in later.calls
        vars(later).update({name: getattr(first, name) for name in broken})
        later.label = "default"
        await until(lambda: len(pool.members) == 2)
        assert holds(later, 2)
    assert caplog.text.count(message) == 1


async def test_a_server_that_is_listed_long_before_it_answers_is_asked_at_one_pace(tmp_path):
    first, later = FakeServer(), FakeServer(faults=[Fault("/model_info", "error", times=99)])
    options = {"started": [later], "health": replace(FAST, longest_pause_s=1000.0)}
    async with listed_fleet(tmp_path, DiskTransport(), first, **options) as (pool, publisher, urls):
        await publish(publisher, 1)
        urls.append(later.url)
        await until(lambda: later.calls.count("/model_info") > 20)
        later.faults.clear()
        await until(lambda: len(pool.members) == 2)


async def test_a_server_that_appears_before_there_are_weights_is_used_once_there_are(tmp_path):
    first, later = FakeServer(), FakeServer()
    fleet_of_one = listed_fleet(tmp_path, DiskTransport(), first, started=[later])
    async with fleet_of_one as (pool, publisher, urls):
        urls.append(later.url)
        await until(lambda: len(pool.known) == 2)
        assert urls_of(pool) == [first.url]
        assert (await publish(publisher, 1)).updated == [first.url]
        await until(lambda: len(pool.members) == 2)
        assert holds(later, 1)


async def test_a_run_begins_with_those_listed_servers_that_fit(tmp_path):
    fits, does_not = FakeServer(), FakeServer(version="0.4.9")
    async with listed_fleet(tmp_path, DiskTransport(), does_not, fits) as (pool, publisher, _):
        assert urls_of(pool) == [fits.url]
        await publish(publisher, 1)
        does_not.version = "0.5.19"
        await until(lambda: len(pool.members) == 2)
        assert [m.slot for m in pool.members] == [0, 1]
    does_not.version = "0.4.9"
    with pytest.raises(ConfigError, match=r"runs SGLang 0\.4\.9; at least 0\.5\.17 is needed"):
        async with listed_fleet(tmp_path, DiskTransport(), does_not):
            pass


async def test_a_server_that_dies_in_its_first_update_is_used_once_it_is_there_again(
    tmp_path, transport, caplog
):
    path = "/update_weights_from_disk"
    path = path if isinstance(transport, DiskTransport) else "/update_weights_from_distributed"
    first, later = FakeServer(), FakeServer(faults=[Fault(path, "die")])
    async with listed_fleet(tmp_path, transport, first, started=[later]) as (pool, publisher, urls):
        await publish(publisher, 1)
        urls.append(later.url)
        await until(lambda: "a server of servers.txt is not used yet" in caplog.text)
        assert (await publish(publisher, 2)).updated == [first.url]
        await later.start()
        await until(lambda: len(pool.members) == 2)
        assert holds(later, 2)


async def test_a_server_that_can_not_prove_its_weights_is_asked_three_times(tmp_path, caplog):
    first = FakeServer()
    later = FakeServer(faults=[Fault("/update_weights_from_disk", "ignore", times=99)])
    options = {"started": [later]}
    fleet_of_one = listed_fleet(tmp_path, DiskTransport(), first, **options)
    async with fleet_of_one as (pool, publisher, urls):
        await publish(publisher, 1)
        later.table = make_table(7)
        urls.append(later.url)
        await until(lambda: "is not used: it could not be brought to the weights 3" in caplog.text)
        assert urls_of(pool) == [first.url]
        later.faults.clear()
        urls.remove(later.url)
        await until(lambda: later.label == "default")
        urls.append(later.url)
        await until(lambda: len(pool.members) == 2)


async def test_an_update_is_not_held_up_by_a_server_that_leaves_meanwhile(tmp_path, transport):
    path = "/update_weights_from_disk"
    path = path if isinstance(transport, DiskTransport) else "/update_weights_from_distributed"
    stays, leaves = FakeServer(), FakeServer(faults=[Fault(path, "hang", times=99)])
    fleet_of_two = listed_fleet(tmp_path, transport, stays, leaves, timeout_s=100)
    async with fleet_of_two as (pool, publisher, urls):
        publishing = asyncio.create_task(publish(publisher, 1))
        await until(lambda: holds(stays, 1) and path in leaves.calls)
        urls.remove(leaves.url)
        report = await publishing
        assert report.updated == [stays.url]
        assert urls_of(pool) == [stays.url]
        assert (await publish(publisher, 2)).updated == [stays.url]


async def test_a_server_that_leaves_while_it_still_comes_holds_nobody_up(tmp_path, transport):
    path = "/update_weights_from_disk"
    path = path if isinstance(transport, DiskTransport) else "/update_weights_from_distributed"
    first, later = FakeServer(), FakeServer(faults=[Fault(path, "hang")])
    options = {"started": [later], "timeout_s": 100}
    fleet_of_one = listed_fleet(tmp_path, transport, first, **options)
    async with fleet_of_one as (pool, publisher, urls):
        await publish(publisher, 1)
        urls.append(later.url)
        await until(lambda: path in later.calls)
        publishing = asyncio.create_task(publish(publisher, 2))
        urls.remove(later.url)
        assert (await publishing).updated == [first.url]
        urls.append(later.url)
        await until(lambda: len(pool.members) == 2)
        assert holds(later, 2)


async def test_a_run_without_servers_goes_on_when_one_appears(tmp_path, caplog):
    first, later = FakeServer(token_delay_s=0.002), FakeServer()
    options = {"started": [later]}
    fleet_of_one = listed_fleet(tmp_path, DiskTransport(), first, **options)
    async with fleet_of_one as (pool, publisher, urls):
        await publish(publisher, 1)
        generating = ask(pool)
        await until(lambda: first.running)
        urls.clear()
        await until(lambda: "no server can be used: waiting up to 300 s for one" in caplog.text)
        publishing = asyncio.create_task(publish(publisher, 2))
        await asyncio.sleep(0.1)
        assert not publishing.done()
        urls.append(later.url)
        report = await publishing
        assert report.waited_s > 0
        assert holds(later, 2)
        assert {c.versions[-1] for c in await asyncio.gather(*generating)} == {2}
        assert pool.failure is None


async def test_a_run_waits_only_so_long_for_a_server_to_appear(tmp_path):
    server = FakeServer()
    health = replace(FAST, patience_s=0.1, min_servers=0)
    fleet_of_one = listed_fleet(tmp_path, DiskTransport(), server, health=health)
    async with fleet_of_one as (pool, publisher, urls):
        await publish(publisher, 1)
        urls.clear()
        with pytest.raises(ServersLostError, match=r"No server of servers\.txt could be used for"):
            await asyncio.wait_for(pool.generate([1], Sampling(max_new_tokens=4000)), 20)


async def test_servers_that_come_and_go_all_the_time_lose_nothing_but_time(tmp_path, transport):
    servers = [FakeServer(token_delay_s=0.001, seed=n) for n in range(3)]
    async with listed_fleet(tmp_path, transport, *servers) as (pool, publisher, urls):
        await publish(publisher, 1)
        generating, draw = ask(pool, 300, prompts=9), random.Random(0)
        for version in range(2, 9):
            urls[:] = [s.url for s in draw.sample(servers, draw.randrange(4))]
            await asyncio.sleep(0.1)
            if urls:
                await publish(publisher, version)  # which waits for one, where all have just left
        urls[:] = [s.url for s in servers]
        for completion in await asyncio.gather(*generating):
            assert len(completion.token_ids) == 300
            assert list(completion.versions) == sorted(completion.versions)
        await until(lambda: sum(m.routable for m in pool.members) == 3)
        assert all(holds(server, pool.members[0].version) for server in servers)
        assert pool.failure is None
        assert all(m.in_flight == m.unanswered == 0 for m in pool.known)
