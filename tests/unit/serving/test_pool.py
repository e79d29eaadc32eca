import asyncio
import errno
import itertools
import resource
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import aiohttp
import psutil
import pytest

from lightning_grpo.errors import (
    ConfigError,
    RequestError,
    ServerError,
    ServersLostError,
    WeightSyncError,
)
from lightning_grpo.serving.client import Together
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.health import HealthPolicy, check_joins, choose_interruption
from lightning_grpo.serving.pool import PoolLimits, ServerPool
from lightning_grpo.serving.server import MemberState, ServerHandle
from lightning_grpo.serving.wire import GenerateReply, GenerateRequest, MetaInfo
from lightning_grpo.types import Sampling
from tests.fakes.server import FakeServer, Fault, log_softmax, make_table, until

pytestmark = pytest.mark.anyio


FAST = HealthPolicy(interval_s=0.02, check_timeout_s=2.0, failed_checks=2)


def decode(ids):
    return " ".join(map(str, ids))


@asynccontextmanager
async def pool_of(*servers, **options):
    async with asyncio.timeout(30):
        for server in servers:
            await server.start()
        requirements = options.pop("requirements", Requirements("run"))
        pool = ServerPool(servers, requirements, decode, **{"health": FAST, **options})
        await pool.start()
        try:
            yield pool
        finally:
            await pool.close()
            for server in servers:
                await server.kill()


async def never(member):
    raise WeightSyncError("it can't be proved")


async def publish(pool, servers, version, table=None):
    """What a publisher does, reduced to its effect."""
    await pool.interrupt()
    for member, server in zip(pool.members, servers, strict=True):
        assert not server.running
        member.mark_updating()
        server.table = table or server.table
        server.label = f"run:{version}"
        await member.unpause()
        member.mark_clean(version, server.label)
    await pool.resume()


def expected_logprobs(prompt, completion, table_of):
    ids = [*prompt, *completion.token_ids]
    pairs = list(itertools.pairwise(ids))[len(prompt) - 1 :]
    return [
        log_softmax(table_of[version][a])[b]
        for (a, b), version in zip(pairs, completion.versions, strict=True)
    ]


async def test_a_completion_carries_ids_logprobs_versions_and_text():
    server = FakeServer()
    async with pool_of(server) as pool:
        completion = await pool.generate([1, 2, 3], Sampling(max_new_tokens=8))
    assert len(completion.token_ids) == len(completion.logprobs) == 8
    assert completion.versions == (0,) * 8
    assert completion.finish_reason == "length"
    assert completion.text == decode(completion.token_ids)
    assert completion.logprobs == pytest.approx(
        expected_logprobs([1, 2, 3], completion, {0: server.table})
    )
    assert server.requests[0]["extra_key"] == "run:0"


@pytest.mark.parametrize("version", ["0.5.17", "0.5.19"])
async def test_an_interrupted_completion_goes_on_with_exact_versions_and_logprobs(version):
    server = FakeServer(version=version, token_delay_s=0.002)
    tables = {n: make_table(n) for n in range(4)}
    async with pool_of(server) as pool:
        generating = [
            asyncio.create_task(pool.generate([1, n], Sampling(max_new_tokens=60)))
            for n in range(4)
        ]
        for n in range(1, 4):
            await until(lambda: len(server.running) == 4)
            await asyncio.sleep(0.02)
            await publish(pool, [server], n, tables[n])
        completions = await asyncio.gather(*generating)
    for n, completion in enumerate(completions):
        assert len(completion.token_ids) == 60
        assert completion.num_interruptions >= 1
        assert list(completion.versions) == sorted(completion.versions)
        assert len(set(completion.versions)) >= 2
        assert completion.logprobs == pytest.approx(expected_logprobs([1, n], completion, tables))
    keys = {r["extra_key"] for r in server.requests}
    assert {"run:0", "run:1"} <= keys


async def test_nothing_is_in_flight_after_an_interruption_and_nothing_is_sent_until_resume():
    server = FakeServer(token_delay_s=0.005)
    async with pool_of(server) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: server.running)
        await pool.interrupt()
        assert not server.running
        assert server.paused
        num_requests = len(server.requests)
        late = asyncio.create_task(pool.generate([2], Sampling(max_new_tokens=2)))
        await asyncio.sleep(0.05)
        assert len(server.requests) == num_requests
        await pool.resume()
        await asyncio.gather(generating, late)


class Turns:
    """Nobody's turn comes before it is let go."""

    def __init__(self):
        self.going = asyncio.Event()

    async def take(self):
        await self.going.wait()


async def test_a_server_is_free_for_an_update_once_it_has_answered_whatever_is_still_to_be_read():
    server = FakeServer(token_delay_s=0.005)
    tables = {0: server.table, 1: make_table(1)}
    async with pool_of(server) as pool:
        (member,) = pool.members
        member.client._turns = turns = Turns()
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: server.running)
        await pool.interrupt()
        assert (member.unanswered, member.in_flight) == (0, 1)
        member.mark_updating()
        member.expect(1, "run:1")
        turns.going.set()
        await until(lambda: member.in_flight == 0)  # it does not wait for the proof
        server.table, server.label = tables[1], "run:1"
        await member.unpause()
        member.mark_clean(1, "run:1")
        await pool.resume()
        completion = await generating
    assert set(completion.versions) == {0, 1}
    assert completion.num_interruptions == 1
    assert completion.logprobs == pytest.approx(expected_logprobs([1], completion, tables))


async def test_what_is_read_after_the_servers_went_on_keeps_its_place_before_fresh_requests():
    server = FakeServer(token_delay_s=0.005, info={"max_running_requests": 1})
    async with pool_of(server) as pool:
        (member,) = pool.members
        member.client._turns = turns = Turns()
        old = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: server.running)
        fresh = asyncio.create_task(pool.generate([2], Sampling(max_new_tokens=2)))
        await until(lambda: pool.num_waiting == 1)
        await pool.interrupt()
        await pool.resume()
        turns.going.set()
        await asyncio.gather(old, fresh)
    assert [request["input_ids"][0] for request in server.requests] == [1, 1, 2]


async def test_an_abort_that_takes_the_last_token_finishes_for_length():
    server = FakeServer()
    async with pool_of(server) as pool:
        await pool.interrupt()
        await pool.resume()
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=3)))
        completion = await generating
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 3


async def test_a_partial_reply_with_a_logprob_missing_is_cut_where_both_agree():
    server = FakeServer(token_delay_s=0.005, drop_last_logprob_of_aborted=True)
    async with pool_of(server) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=30)))
        await until(lambda: server.running)
        await asyncio.sleep(0.03)
        await publish(pool, [server], 1)
        completion = await generating
    assert len(completion.token_ids) == len(completion.logprobs) == 30
    assert completion.logprobs == pytest.approx(
        expected_logprobs([1], completion, {0: server.table, 1: server.table})
    )


async def test_min_new_tokens_and_the_budget_shrink_by_what_is_there():
    server = FakeServer(token_delay_s=0.005)
    async with pool_of(server) as pool:
        sampling = Sampling(max_new_tokens=30, min_new_tokens=30)
        generating = asyncio.create_task(pool.generate([1], sampling))
        await until(lambda: server.running)
        await asyncio.sleep(0.03)
        await publish(pool, [server], 1)
        await generating
    second = server.requests[1]
    done = len(second["input_ids"]) - 1
    assert done > 0
    assert second["sampling_params"]["max_new_tokens"] == 30 - done
    assert second["sampling_params"]["min_new_tokens"] == 30 - done


async def test_a_stop_string_across_an_interruption_ends_the_completion_where_it_ends():
    server = FakeServer(token_delay_s=0.002, table=cycle_table())
    async with pool_of(server) as pool:
        sampling = Sampling(max_new_tokens=60, stop=("9 10 11 12 13 14 15 0 1 2 3 4 5 6 7 8 9",))
        generating = asyncio.create_task(pool.generate([0], sampling))
        await until(lambda: server.running)
        await asyncio.sleep(0.03)
        await publish(pool, [server], 1)
        completion = await generating
    assert completion.finish_reason == "stop"
    assert completion.text.endswith(sampling.stop[0])
    assert completion.text.count(sampling.stop[0]) == 1
    assert len(completion.token_ids) == len(completion.versions) == len(completion.logprobs)


def cycle_table():
    return [[100.0 if b == (a + 1) % 16 else 0.0 for b in range(16)] for a in range(16)]


async def test_a_group_stays_on_one_server_unless_that_is_overloaded():
    servers = [FakeServer(token_delay_s=0.002), FakeServer(token_delay_s=0.002)]
    async with pool_of(*servers) as pool:
        await asyncio.gather(
            *(
                pool.generate([g], Sampling(max_new_tokens=5), group_key=g)
                for g in (0, 1)
                for _ in range(4)
            )
        )
        by_prompt = [{r["input_ids"][0] for r in s.requests} for s in servers]
        assert by_prompt == [{0}, {1}]
        await asyncio.gather(
            *(pool.generate([3], Sampling(max_new_tokens=20), group_key=3) for _ in range(40))
        )
    spread = [sum(r["input_ids"][0] == 3 for r in s.requests) for s in servers]
    assert min(spread) >= 10


async def test_a_server_holds_no_more_requests_than_its_bound_and_evaluation_goes_first():
    server = FakeServer(token_delay_s=0.002)
    most = 0
    async with pool_of(server, limits=PoolLimits(requests_per_server=2)) as pool:
        fresh = [
            asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=5))) for _ in range(6)
        ]
        await until(lambda: len(server.running) == 2)
        urgent = asyncio.create_task(pool.generate([9], Sampling(max_new_tokens=5), priority=True))
        while not all(t.done() for t in [*fresh, urgent]):
            most = max(most, len(server.running))
            await asyncio.sleep(0)
    order = [r["input_ids"][0] for r in server.requests]
    assert order.index(9) == 2
    assert most == 2


async def test_the_bound_comes_from_what_the_server_says():
    async with pool_of(FakeServer(info={"max_running_requests": 7})) as pool:
        assert pool.members[0].bound == 7


@pytest.mark.parametrize("kind", ["error", "drop"])
async def test_a_failed_request_goes_to_another_server(kind):
    servers = [FakeServer(faults=[Fault("/generate", kind)]), FakeServer(seed=1)]
    async with pool_of(*servers) as pool:
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert len(completion.token_ids) == 4
        assert len(servers[1].requests) == 1
        await until(lambda: pool.members[0].routable)


async def test_a_server_that_dies_hands_its_request_with_its_tokens_to_another():
    servers = [FakeServer(token_delay_s=0.005), FakeServer(token_delay_s=0.005)]
    async with pool_of(*servers) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: servers[0].running)
        await asyncio.sleep(0.03)
        await publish(pool, servers, 1)
        holder = servers[0] if servers[0].running else servers[1]
        await until(lambda: any(s.running for s in servers))
        holder = next(s for s in servers if s.running)
        await holder.kill()
        completion = await generating
        other = next(s for s in servers if s is not holder)
    assert len(completion.token_ids) == 40
    assert len(other.requests[-1]["input_ids"]) > 1
    assert completion.versions[0] == 0
    assert completion.versions[-1] == 1


async def test_a_refused_request_raises_with_the_servers_words():
    async with pool_of(FakeServer()) as pool:
        with pytest.raises(RequestError, match="id out of range"):
            await pool.generate([99], Sampling(max_new_tokens=4))


async def test_a_request_that_always_fails_ends_with_the_servers_name():
    server = FakeServer(faults=[Fault("/generate", "error", times=99)])
    async with pool_of(server) as pool:
        with pytest.raises(ServerError, match=f"{server.url}/generate answered 500"):
            await pool.generate([1], Sampling(max_new_tokens=4))


async def test_weights_of_another_run_make_the_server_dirty():
    servers = [FakeServer(), FakeServer()]
    async with pool_of(*servers) as pool:
        servers[0].label = "other:4"
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert completion.versions == (0,) * 4
        assert pool.members[0].state is MemberState.DIRTY
        assert "other:4" in pool.members[0].reason
        for _ in range(4):
            await pool.generate([1], Sampling(max_new_tokens=2))
        assert len(servers[0].requests) == 1


async def test_a_dirty_server_is_never_routed_to_and_loses_its_requests():
    servers = [FakeServer(token_delay_s=0.005), FakeServer()]
    async with pool_of(*servers) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=500)))
        await until(lambda: servers[0].running)
        pool.members[0].mark_dirty("for the test")
        completion = await generating
    assert len(completion.token_ids) == 500
    assert len(servers[1].requests) == 1


async def test_a_server_that_keeps_its_requests_is_given_up_by_the_interruption():
    servers = [FakeServer(faults=[Fault("/generate", "hang")]), FakeServer()]
    async with pool_of(*servers) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=5)))
        await until(lambda: "/generate" in servers[0].calls)
        await pool.interrupt(timeout_s=0.2)
        assert pool.members[0].state is MemberState.DIRTY
        await pool.resume()
        completion = await generating
    assert len(completion.token_ids) == 5
    assert len(servers[1].requests) == 1


async def test_a_dead_server_is_started_again_with_the_current_weights_until_it_dies_too_often():
    server = FakeServer(token_delay_s=0.005, tail="its last words")
    restored = []

    async def restart(url):
        assert url == server.url
        server.port = 0
        await server.start()
        return server

    async def restore(member):
        restored.append(member.slot)
        member.mark_clean(5, "default")

    async with pool_of(server, restart=restart, health=replace(FAST, max_restarts=1)) as pool:
        pool.on_restart(restore)
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=30)))
        await until(lambda: server.running)
        await server.kill()
        completion = await generating
        assert set(completion.versions) == {5}
        assert restored == [0]
        again = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=3000)))
        await until(lambda: server.running)
        await server.kill()
        with pytest.raises(
            ServersLostError, match="failed 2 times within 60 s of service"
        ) as error:
            await again
        assert server.url in str(error.value)
        assert "its last words" in str(error.value)
        assert "--ckpt_path last" in str(error.value)
        with pytest.raises(ServersLostError):
            await pool.generate([1], Sampling())
        assert isinstance(pool.failure, ServersLostError)


async def test_without_a_restart_the_run_goes_on_with_the_servers_that_are_left():
    servers = [FakeServer(), FakeServer()]
    async with pool_of(*servers) as pool:
        await servers[0].kill()
        for _ in range(3):
            await pool.generate([1], Sampling(max_new_tokens=2))
        await until(lambda: not pool.members[0].alive)
        assert pool.failure is None


async def test_fewer_servers_than_the_least_end_the_run():
    servers = [FakeServer(), FakeServer()]
    policy = replace(FAST, min_servers=2, patience_s=0.05)
    async with pool_of(*servers, health=policy) as pool:
        await servers[0].kill()
        await until(lambda: pool.failure is not None)
        assert servers[0].url in str(pool.failure)
        assert "1 of 2 servers are left, at least 2 needed" in str(pool.failure)


async def test_a_process_that_is_gone_is_noticed_without_a_request():
    process = await asyncio.create_subprocess_exec("sleep", "60")
    server = FakeServer(pid=process.pid)
    async with pool_of(server) as pool:
        process.kill()
        await process.wait()
        await until(lambda: pool.failure is not None)
        assert f"process {process.pid} is gone" in str(pool.failure)


async def test_requests_wait_only_so_long_when_no_server_is_usable():
    server = FakeServer(tail="log of the server")
    async with pool_of(server, health=replace(FAST, patience_s=0.05)) as pool:
        pool.on_restart(never)
        pool.members[0].mark_dirty("for the test")
        with pytest.raises(ServersLostError, match="for the test") as error:
            await pool.generate([1], Sampling())
    assert "log of the server" in str(error.value)


async def test_a_cancelled_request_frees_its_place():
    server = FakeServer(token_delay_s=0.005)
    async with pool_of(server, limits=PoolLimits(requests_per_server=1)) as pool:
        first = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=3000)))
        await until(lambda: server.running)
        waiting = asyncio.create_task(pool.generate([2], Sampling(max_new_tokens=2)))
        await until(lambda: pool.num_waiting == 1)
        waiting.cancel()
        first.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)
        assert pool.num_in_flight == 0
        assert pool.num_waiting == 0
        await pool.generate([3], Sampling(max_new_tokens=2))


async def test_a_server_under_update_is_not_asked_for_its_health():
    server = FakeServer()
    async with pool_of(server) as pool:
        await until(lambda: "/health" in server.calls)
        pool.members[0].mark_updating()
        await asyncio.sleep(0.05)
        server.calls.clear()
        await asyncio.sleep(0.1)
        assert "/health" not in server.calls
        pool.members[0].mark_clean(1, "run:1")
        await until(lambda: "/health" in server.calls)


async def test_a_paused_server_is_asked_only_whether_it_listens():
    server = FakeServer()
    async with pool_of(server) as pool:
        await pool.interrupt()
        await asyncio.sleep(0.05)
        server.calls.clear()
        await until(lambda: server.calls.count("/model_info") > FAST.failed_checks)
        assert "/health" not in server.calls
        assert pool.members[0].routable
        await pool.resume()
        assert len((await pool.generate([1], Sampling(max_new_tokens=2))).token_ids) == 2


async def test_a_server_that_dies_while_it_is_paused_is_noticed():
    server = FakeServer()
    async with pool_of(server) as pool:
        await pool.interrupt()
        await server.kill()
        await until(lambda: not pool.members[0].alive)


@pytest.mark.parametrize("name_of_old", ["default", "run:6"])
async def test_a_server_that_restarted_by_itself_with_old_weights_is_dirty(name_of_old):
    servers = [FakeServer(), FakeServer()]
    async with pool_of(*servers) as pool:
        await publish(pool, servers, 6)
        await publish(pool, servers, 7)
        servers[0].label = name_of_old
        completion = await pool.generate([1], Sampling(max_new_tokens=4))
        assert completion.versions == (7,) * 4
        assert pool.members[0].state is MemberState.DIRTY


async def test_the_name_of_weights_before_they_were_published_is_not_theirs():
    servers = [FakeServer(), FakeServer()]
    async with pool_of(*servers) as pool:
        await publish(pool, servers, 0)  # a resumed run brings its weights under the same version
        servers[0].label = "default"
        await pool.generate([1], Sampling(max_new_tokens=4))
        assert pool.members[0].state is MemberState.DIRTY


async def test_nobody_waits_for_a_server_that_is_lost_beside_a_dirty_one():
    servers = [FakeServer(), FakeServer()]
    async with pool_of(*servers, health=replace(FAST, patience_s=0.05)) as pool:
        pool.on_restart(never)
        await servers[1].kill()
        await until(lambda: not pool.members[1].alive)
        pool.members[0].mark_dirty("for the test")
        with pytest.raises(ServersLostError, match="for the test"):
            await pool.wait_until_clean(15)


async def test_a_server_is_idle_only_while_it_has_no_request():
    server = FakeServer(token_delay_s=0.005)
    async with pool_of(server) as pool:
        (member,) = pool.members
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: server.running)
        before = member.idle_s
        await asyncio.sleep(0.05)
        assert member.idle_s == before > 0
        await generating
        await asyncio.sleep(0.01)
        assert member.idle_s > before


async def test_the_seed_goes_with_every_piece_of_a_completion():
    server = FakeServer(token_delay_s=0.005)
    async with pool_of(server) as pool:
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=20), seed=7))
        await until(lambda: server.running)
        await publish(pool, [server], 1)
        await generating
        await pool.generate([1], Sampling(max_new_tokens=2))
    *seeded, plain = [r["sampling_params"] for r in server.requests]
    assert [params["sampling_seed"] for params in seeded] == [7, 7]
    assert "sampling_seed" not in plain


@pytest.mark.parametrize(
    ("server", "requirements", "message"),
    [
        ({}, {"deterministic": True}, "Start it with `--enable-deterministic-inference`"),
        ({"version": "0.5.3"}, {}, "runs SGLang 0.5.3"),
        ({"label": "other:3"}, {}, "weights 'other:3' of another run"),
        (
            {"model": {"preferred_sampling_params": {"min_p": 0.1}}},
            {},
            r"adds sampling parameters of its own .*'min_p': 0.1.*preferred-sampling-params",
        ),
        ({"info": {"context_length": 100}}, {"max_tokens": 200}, "takes at most 100 tokens"),
        (
            {"info": {"max_req_input_len": 90}},
            {"max_tokens": 91},
            r"at most 90 .*max_req_input_len",
        ),
        ({"info": {"vocab_size": 16}}, {"vocab_size": 17}, "vocabulary of 16, the trainer's"),
        ({"api_key": "secret"}, {}, "wants another API key"),
        (
            {"lacks": ("pause_generation",)},
            {},
            r"\(SGLang 0\.5\.19\) has no /pause_generation, .*at least 0\.5\.17",
        ),
        (
            {"version": "0.0.0.dev1", "lacks": ("begin_weight_update", "end_weight_update")},
            {},
            r"has no /begin_weight_update, /end_weight_update",
        ),
        (
            {"model": {"architectures": ["Qwen2ForCausalLM"]}},
            {"architecture": "Qwen3ForCausalLM"},
            "another model than the trainer's: Qwen2ForCausalLM instead of Qwen3ForCausalLM",
        ),
        (
            {"tokens": [5, 9, 9], "model": {"tokenizer_path": "theirs"}},
            {"sample": ("a text", (5, 6, 7))},
            r"another tokenizer \('theirs'\) .*'a text'.*\[9, 9\] from token 1 on, .* \[6, 7\]",
        ),
        ({"tokens": [5]}, {"sample": ("a text", (5, 6))}, "another tokenizer"),
    ],
)
async def test_an_unfit_server_is_refused_at_the_start_by_name(server, requirements, message):
    async with FakeServer(**server) as fake:
        pool = ServerPool([fake], Requirements("run", **requirements), decode)
        with pytest.raises(ConfigError, match=message) as error:
            await pool.start()
    assert fake.url in str(error.value)


async def test_a_server_of_the_same_model_and_tokenizer_is_fit_and_so_is_one_that_cannot_say():
    requirements = Requirements("run", architecture="Qwen3ForCausalLM", sample=("a text", (5, 6)))
    same = {"model": {"architectures": ["Qwen3ForCausalLM"]}, "tokens": [5, 6]}
    for settings in (same, {}):
        async with pool_of(FakeServer(**settings), requirements=requirements) as pool:
            assert pool.members[0].routable


async def test_weights_of_other_sizes_are_refused_where_the_folder_can_be_read(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 2}')
    requirements = Requirements("run", shape={"hidden_size": 32, "num_hidden_layers": 2})
    async with FakeServer(model={"model_path": str(tmp_path)}) as fake:
        pool = ServerPool([fake], requirements, decode)
        with pytest.raises(ConfigError, match="than the trainer's: hidden_size 64 instead of 32"):
            await pool.start()


async def test_a_url_where_nothing_listens_is_named():
    fake = FakeServer()
    await fake.start()
    await fake.kill()
    pool = ServerPool([fake], Requirements("run"), decode)
    with pytest.raises(ServerError, match=f"No inference server answers at {fake.url}"):
        await pool.start()


@pytest.mark.parametrize(
    ("server", "mode", "message"),
    [
        ({"version": "0.5.17"}, "retract", "does not say which weights sampled which token"),
        ({"version": "0.5.17"}, "in_place", "must be abort"),
        ({"info": {"disable_radix_cache": False}}, "retract", "disable-radix-cache: true"),
    ],
)
async def test_a_way_of_interruption_that_would_be_wrong_is_refused(server, mode, message):
    async with pool_of(FakeServer(**server)) as pool:
        assert choose_interruption("abort", pool.members) == "abort"
        assert choose_interruption("auto", pool.members) == "abort"
        with pytest.raises(ConfigError, match=message):
            choose_interruption(mode, pool.members)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"disable_radix_cache": False}, "`interruption` can't be retract for http"),
        ({"dtype": "bfloat16"}, "computes in bfloat16, the servers at the start in float32"),
    ],
)
async def test_a_server_that_does_otherwise_than_those_of_the_start_does_not_join(info, message):
    async with pool_of(FakeServer(info=info)) as pool:
        (member,) = pool.members
        with pytest.raises(ConfigError, match=message):
            check_joins(member, "retract", {"float32"})
    async with pool_of(FakeServer(info={"disable_radix_cache": True})) as pool:
        check_joins(pool.members[0], "retract", {"float32", "bfloat16"})


async def test_requests_are_never_retracted_where_tokens_must_keep_their_experts():
    async with pool_of(FakeServer(version="0.5.19")) as pool:
        assert choose_interruption("auto", pool.members, routes=True) == "abort"
        assert choose_interruption("abort", pool.members, routes=True) == "abort"
        assert choose_interruption("in_place", pool.members, routes=True) == "in_place"
        with pytest.raises(ConfigError, match="must not be retract with `router_replay`"):
            choose_interruption("retract", pool.members, routes=True)


async def test_requests_are_retracted_where_every_server_does_it_exactly():
    servers = [FakeServer(version="0.5.19") for _ in range(2)]
    async with pool_of(*servers) as pool:
        assert choose_interruption("auto", pool.members) == "retract"
        assert choose_interruption("abort", pool.members) == "abort"


async def test_a_reply_that_comes_while_weights_change_counts_once_they_are_proved():
    server = FakeServer(token_delay_s=0.002)
    tables = {0: server.table, 1: make_table(1)}
    async with pool_of(server) as pool:
        (member,) = pool.members
        generating = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=40)))
        await until(lambda: server.running)
        await pool.interrupt(mode="in_place")
        assert server.running
        member.mark_updating()
        member.expect(1, "run:1")
        server.table, server.label = tables[1], "run:1"
        await until(lambda: not server.running)
        await asyncio.sleep(0.05)
        assert not generating.done()
        await member.unpause()
        member.mark_clean(1, "run:1")
        await pool.resume()
        completion = await generating
    assert set(completion.versions) == {0, 1}
    assert completion.num_interruptions == 0
    assert completion.logprobs == pytest.approx(expected_logprobs([1], completion, tables))


@pytest.mark.parametrize("of_the_model", [True, False])
async def test_an_end_token_ends_a_completion_that_its_server_calls_aborted(of_the_model):
    server = FakeServer(end_token=5, abort_hides_the_end=True)
    ends = frozenset([5] if of_the_model else [])
    requirements = Requirements("run", end_ids=ends)
    sampling = Sampling(max_new_tokens=500, stop_token_ids=() if of_the_model else (5,))
    async with pool_of(server, requirements=requirements) as pool:
        completion = await pool.generate([1], sampling)
    assert completion.finish_reason == "stop"
    assert completion.token_ids.index(5) == len(completion.token_ids) - 1
    assert len(server.requests) == 1


@pytest.mark.parametrize("ids", [[], [3, -1], [16, 3]])
async def test_a_prompt_that_would_end_a_server_is_never_sent(ids):
    server = FakeServer()
    async with pool_of(server, requirements=Requirements("run", vocab_size=16)) as pool:
        with pytest.raises(RequestError, match="prompt"):
            await pool.generate(ids, Sampling())
    assert not server.requests


async def test_the_api_key_is_sent_and_stays_out_of_messages():
    server = FakeServer(api_key="hush", faults=[Fault("/generate", "error", times=99)])
    async with pool_of(server, api_key="hush") as pool:
        with pytest.raises(ServerError) as error:
            await pool.generate([1], Sampling())
    assert "hush" not in str(error.value)


async def test_a_groups_requests_travel_together_also_over_an_interruption():
    server = FakeServer(token_delay_s=0.001)
    limits = PoolLimits(together=True)
    async with pool_of(server, limits=limits) as pool:
        sampling = Sampling(max_new_tokens=60)
        group = [asyncio.create_task(pool.generate([1, 2, 3], sampling)) for _ in range(4)]
        await until(lambda: len(server.running) == 4)
        await publish(pool, [server], 1)
        done = await asyncio.gather(*group)
    assert all(len(completion.token_ids) == 60 for completion in done)
    assert all(completion.versions[-1] == 1 for completion in done)
    assert server.calls.count("/generate") < len(server.requests)


@pytest.mark.parametrize(("times", "retry_after"), [(12, "0.05"), (9, None)])
async def test_a_busy_server_is_left_alone_and_its_requests_are_not_counted(
    times, retry_after, caplog
):
    busy = Fault("/generate", "busy", times, status=429, retry_after=retry_after)
    server = FakeServer(faults=[busy])
    limits = PoolLimits(max_failovers=0)
    async with pool_of(server, limits=limits) as pool:
        completions = await asyncio.gather(
            *(pool.generate([1], Sampling(max_new_tokens=2)) for _ in range(8))
        )
        assert all(len(c.token_ids) == 2 for c in completions)
        assert pool.members[0].state is MemberState.CLEAN
    (told,) = [r.message for r in caplog.records]
    assert "server 0 is busy and waited for" in told
    assert f"{server.url}/generate answered 429: the queue is full" in told


async def test_what_a_busy_server_puts_off_goes_to_another():
    servers = [
        FakeServer(faults=[Fault("/generate", "busy", 99, retry_after="60")]),
        FakeServer(seed=1),
    ]
    async with pool_of(*servers) as pool:
        for _ in range(6):
            await pool.generate([1], Sampling(max_new_tokens=2))
    assert servers[0].calls.count("/generate") == 1
    assert len(servers[1].requests) == 6


async def test_a_server_with_a_short_queue_is_given_what_it_takes():
    server = FakeServer(token_delay_s=0.005, most_running=4)
    async with pool_of(server) as pool:
        completions = await asyncio.gather(
            *(pool.generate([1], Sampling(max_new_tokens=4)) for _ in range(40))
        )
    assert all(len(c.token_ids) == 4 for c in completions)


async def test_a_server_that_is_busy_for_longer_than_the_patience_is_proved_again(caplog):
    server = FakeServer(faults=[Fault("/generate", "busy", 8, retry_after="0.03")])
    restored = []

    async def restore(member):
        restored.append(member.slot)
        member.mark_clean(0, "default")

    async with pool_of(server, health=replace(FAST, patience_s=0.1)) as pool:
        pool.on_restart(restore)
        await pool.generate([1], Sampling(max_new_tokens=2))
    assert restored
    assert any("it was busy for" in r.message for r in caplog.records)


def at(reply, name, change):
    reply["meta_info"][name] = change(reply["meta_info"][name])


def logprob(value):
    def spoil(reply):
        reply["meta_info"]["output_token_logprobs"][2][0] = value

    return spoil


def token(value):
    def spoil(reply):
        reply["output_ids"][2] = value
        reply["meta_info"]["output_token_logprobs"][2][1] = value

    return spoil


def lengthen(reply):
    reply["output_ids"] *= 50
    reply["meta_info"]["output_token_logprobs"] *= 50
    reply["meta_info"]["weight_versions"][0]["end"] *= 50


def empty(reply):
    reply["output_ids"], reply["meta_info"]["output_token_logprobs"] = [], []
    reply["meta_info"]["weight_versions"] = []
    reply["meta_info"]["finish_reason"] = {"type": "stop"}


def spans(*given):
    named = [dict(zip(("version", "start", "end"), span, strict=True)) for span in given]
    return lambda reply: at(reply, "weight_versions", lambda _: named)


LIES = {
    "an id beyond the vocabulary": (token(16), "the token id 16, which is not in"),
    "an id below 0": (token(-1), "the token id -1, which is not in"),
    "an enormous id": (token(10**30), "which is not in the model's vocabulary of 16"),
    "an id that is no int": (token(2.0), "sent what is no"),
    "more tokens than asked": (lengthen, "sent 200 tokens where 4 were asked for"),
    "a logprob above 0": (logprob(0.25), "sent 0.25 as the logprob of token 2 of 4"),
    "a logprob of nothing": (logprob(None), "sent None as the logprob of token 2 of 4"),
    "a logprob that is impossible": (logprob(-1e30), "sent -1e+30 as the logprob of token 2"),
    "a logprob that is no number": (logprob("x"), "sent what is no"),
    "too few logprobs": (
        lambda reply: reply["meta_info"]["output_token_logprobs"].pop(),
        "4 token ids with 3 logprobs",
    ),
    "too many logprobs": (
        lambda reply: reply["meta_info"]["output_token_logprobs"].append([-1.0, 1, None]),
        "4 token ids with 5 logprobs",
    ),
    "logprobs of other tokens": (
        lambda reply: reply["output_ids"].reverse() or reply["output_ids"].__setitem__(0, 15),
        "logprobs that are not theirs",
    ),
    "no logprobs": (
        lambda reply: reply["meta_info"].pop("output_token_logprobs"),
        "4 token ids with 0 logprobs",
    ),
    "an unknown reason": (
        lambda reply: at(reply, "finish_reason", lambda _: {"type": "tired"}),
        "the finish reason 'tired', which is none of stop, length, abort",
    ),
    "no reason": (lambda reply: at(reply, "finish_reason", lambda _: None), "reason None"),
    "nothing": (empty, "a completion that has ended without a token"),
    "another request's answer": (
        lambda reply: at(reply, "id", lambda _: "run-77"),
        "the answer to another request ('run-77'",
    ),
    "a shortened prompt": (
        lambda reply: reply["meta_info"].update(prompt_tokens=1),
        "an answer to 1 of the prompt's 2 tokens",
    ),
    "no weights": (
        lambda reply: [reply["meta_info"].pop(k) for k in ("weight_version", "weight_versions")],
        "does not say which weights sampled 4 tokens",
    ),
    "versions of too few tokens": (spans(("default", 0, 3)), "versions for 3 of 4 tokens"),
    "versions of too many tokens": (spans(("default", 0, 5)), "the tokens 0 to 5 of 4"),
    "versions with a gap": (spans(("default", 0, 1), ("default", 2, 5)), "the tokens 2 to 5 of 4"),
    "versions that overlap": (
        spans(("default", 0, 3), ("default", 2, 3)),
        "the tokens 2 to 3 of 4, after 3",
    ),
    "versions backwards": (spans(("default", 4, 0), ("default", 0, 8)), "the tokens 4 to 0 of 4"),
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("lie", LIES)
async def test_a_reply_that_can_not_be_is_refused_and_its_server_proved_before_it_is_used(
    lie, together, caplog
):
    spoil, message = LIES[lie]
    servers = [FakeServer(spoil=spoil), FakeServer(seed=1)]
    restored = []

    async def restore(member):
        restored.append(member.slot)
        servers[member.slot].spoil = None
        member.mark_clean(0, "default")

    options = {"requirements": Requirements("run", vocab_size=16)}
    async with pool_of(*servers, limits=PoolLimits(together=together), **options) as pool:
        pool.on_restart(restore)
        honest = await asyncio.gather(
            *(pool.generate([1, 2], Sampling(max_new_tokens=4), group_key=0) for _ in range(3))
        )
        await until(lambda: restored)
        await until(lambda: all(m.routable for m in pool.members))
    assert restored == [0]
    assert all(len(completion.token_ids) == 4 for completion in honest)
    assert all(-20 < x <= 0 for completion in honest for x in completion.logprobs)
    (out,) = [r.message for r in caplog.records if "is out, and proved again" in r.message]
    assert servers[0].url in out
    assert message in out


async def test_a_logprob_above_zero_by_rounding_is_taken():
    async with pool_of(FakeServer(spoil=logprob(1e-5))) as pool:
        completion = await pool.generate([1, 2], Sampling(max_new_tokens=4))
    assert completion.logprobs[2] == 1e-5


@pytest.mark.parametrize("told", [-5, 0])
async def test_a_server_that_says_it_runs_no_request_at_once_is_given_some(told):
    async with pool_of(FakeServer(info={"max_running_requests": told})) as pool:
        assert len((await pool.generate([1], Sampling(max_new_tokens=2))).token_ids) == 2


async def test_no_request_leaves_a_pool_that_is_held_before_it_is_let_go():
    server = FakeServer()
    await server.start()
    pool = ServerPool([server], Requirements("run"), decode, health=FAST)
    pool.hold()
    async with pool:
        asked = asyncio.create_task(pool.generate([1], Sampling(max_new_tokens=2)))
        await asyncio.sleep(0.05)
        assert not server.requests
        await pool.resume()
        await asked
    await server.kill()


async def test_requests_that_leave_at_once_leave_a_few_in_each_turn_and_groups_whole():
    server = FakeServer(info={"max_running_requests": 1000})

    class Counting(ServerPool):
        async def _send(self, member, partial, num_late):
            turns[-1].append(partial._prompt[0])
            return await super()._send(member, partial, num_late)

    turns = [[]]

    def turn():
        if turns[-1]:
            turns.append([])
        asyncio.get_running_loop().call_soon(turn)

    await server.start()
    async with Counting([server], Requirements("run"), decode, health=FAST) as pool:
        await pool.interrupt()
        short = Sampling(max_new_tokens=1)
        asked = [
            asyncio.create_task(pool.generate([n // 6], short, group_key=n // 6)) for n in range(96)
        ]
        await until(lambda: pool.num_waiting == 96)
        turn()
        await pool.resume()
        await asyncio.gather(*asked)
    sizes = [len(each) for each in turns if each]
    assert sum(sizes) == 96
    assert max(sizes) <= 18
    assert all(each.count(prompt) % 6 == 0 for each in turns for prompt in set(each))
    await server.kill()


async def test_a_process_without_descriptors_blames_no_server_and_sends_what_it_can(caplog):
    with null_server() as url:
        pool = ServerPool([ServerHandle(url)], Requirements("run"), decode, health=FAST)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with pool:
            resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 12, hard))
            try:
                asked = [pool.generate([n], Sampling(max_new_tokens=2)) for n in range(100)]
                completions = await asyncio.gather(*asked)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert pool.members[0].routable
    assert len(completions) == 100
    (told,) = [r.message for r in caplog.records]
    assert "`ulimit -n`" in told
    assert url not in told


async def test_a_process_that_never_gets_a_descriptor_ends_the_run_by_name():
    server = FakeServer()
    policy = replace(FAST, patience_s=0.2)
    async with pool_of(server, health=policy) as pool:
        pool.members[0].client._session = NoFiles(pool.members[0].client._session)
        with pytest.raises(ConfigError, match=r"`ulimit -n`.* No request could be sent for 0\.2 s"):
            await pool.generate([1], Sampling())
        assert pool.members[0].alive


class NoFiles:
    """A session in a process that has no descriptor left."""

    def __init__(self, session):
        self.session = session

    def request(self, *args, **kwargs):
        return self

    async def __aenter__(self):
        raise aiohttp.ClientOSError(errno.EMFILE, "Too many open files")

    async def __aexit__(self, *error):
        pass


@contextmanager
def null_server():
    """One that answers at once, in a process of its own: it has its own descriptors."""
    command = [sys.executable, "-m", "benchmarks.null_server", "--new-tokens", "2"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


class Client:
    """Answers with the number in each request's name, once it is allowed to."""

    def __init__(self, error=None):
        self.exchanges = []
        self.open = asyncio.Event()
        self.cancelled = 0
        self.error = error

    async def generate_together(self, requests, arrived):
        self.exchanges.append([request.rid for request in requests])
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        arrived()
        return [GenerateReply(MetaInfo(), [int(request.rid)]) for request in requests]


def ask(together, client, name, prompt=(1, 2), told=None):
    told = [] if told is None else told
    request = GenerateRequest(list(prompt), {}, return_logprob=True, rid=str(name))

    async def generate():
        return await together.join(client, request).reply(
            request, arrived=lambda: told.append(request.rid)
        )

    return asyncio.create_task(generate())


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_those_of_one_moment_and_prompt_share_an_exchange_and_each_gets_its_reply():
    together, client = Together(), Client()
    told = []
    tasks = [ask(together, client, i, prompt=[7, i % 2], told=told) for i in range(6)]
    await settle()
    assert not told
    later = ask(together, client, 9, prompt=[7, 0])
    await settle()
    client.open.set()
    replies = await asyncio.gather(*tasks, later)
    assert [reply.output_ids for reply in replies] == [[0], [1], [2], [3], [4], [5], [9]]
    assert client.exchanges == [["0", "2", "4"], ["1", "3", "5"], ["9"]]
    assert sorted(told) == list("012345")


async def test_servers_do_not_share_exchanges():
    together, one, other = Together(), Client(), Client()
    one.open.set()
    other.open.set()
    await asyncio.gather(ask(together, one, 1), ask(together, other, 2))
    assert (one.exchanges, other.exchanges) == ([["1"]], [["2"]])


async def test_an_exchange_ends_with_the_last_who_waits_for_it():
    together, client = Together(), Client()
    tasks = [ask(together, client, i) for i in range(3)]
    await settle()
    for task in tasks[:2]:
        task.cancel()
    await settle()
    assert client.cancelled == 0
    tasks[2].cancel()
    await settle()
    assert client.cancelled == 1


async def test_whoever_leaves_before_it_was_sent_leaves_nothing_behind():
    together, client = Together(), Client()
    task = ask(together, client, 0)
    await asyncio.sleep(0)
    task.cancel()
    await settle()
    assert client.exchanges == []
    client.open.set()
    assert (await ask(together, client, 1)).output_ids == [1]


async def test_whoever_comes_while_the_last_one_leaves_has_an_exchange_of_its_own():
    together, client = Together(), Client()
    client.open.set()
    first = ask(together, client, 0)
    await asyncio.sleep(0)
    first.cancel()
    second = ask(together, client, 1)  # runs between the cancellation and its effect
    await settle()
    assert first.cancelled()
    assert (await second).output_ids == [1]
    assert client.exchanges == [["1"]]


async def test_an_exchange_that_fails_fails_all_of_them():
    together, client = Together(), Client(error=ServerError("gone"))
    tasks = [ask(together, client, i) for i in range(3)]
    client.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ServerError] * 3
