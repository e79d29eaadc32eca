from contextlib import asynccontextmanager

import pytest

from lightning_grpo.errors import RequestError, ServerError
from lightning_grpo.rollout import wire
from lightning_grpo.rollout.client import ServerClient, error_message, new_session
from lightning_grpo.types import Sampling
from tests.fakes.server import FakeServer, Fault

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@asynccontextmanager
async def client_of(server, api_key=None, **options):
    async with server, new_session(api_key) as session:
        yield ServerClient(server.url, session, **options)


def request(ids=(1, 2), max_new_tokens=3):
    params = wire.sampling_params(
        Sampling(), max_new_tokens=max_new_tokens, min_new_tokens=0, seed=None
    )
    return wire.GenerateRequest(list(ids), params, True, rid="r")


async def test_a_reply_is_typed():
    async with client_of(FakeServer()) as client:
        reply = await client.generate(request())
        assert len(reply.output_ids) == 3
        assert reply.meta_info.finish_reason.type == "length"
        assert reply.meta_info.weight_versions[0].end == 3
        assert (await client.server_info()).version == "0.5.19"
        assert (await client.model_info()).weight_version == "default"
        assert await client.healthy()


async def test_scores_are_aligned_with_the_tokens():
    server = FakeServer()
    async with client_of(server) as client:
        scores = await client.score([3, 1, 2])
    assert scores == pytest.approx(server.scores([3, 1, 2]))
    assert scores[0] == 0.0
    assert server.requests[0]["logprob_start_len"] == 0
    assert server.requests[0]["sampling_params"]["max_new_tokens"] == 0


async def test_a_4xx_is_the_requests_fault_and_carries_the_servers_words():
    async with client_of(FakeServer()) as client:
        with pytest.raises(RequestError, match="answered 400: id out of range"):
            await client.generate(request([99]))


async def test_a_5xx_and_a_broken_connection_name_the_url():
    server = FakeServer(faults=[Fault("/generate", "error"), Fault("/generate", "drop")])
    async with client_of(server) as client:
        for _ in range(2):
            with pytest.raises(ServerError, match=f"{server.url}/generate") as error:
                await client.generate(request())
            assert not isinstance(error.value, RequestError)


async def test_a_generation_is_never_sent_twice():
    server = FakeServer(faults=[Fault("/generate", "error")])
    async with client_of(server) as client:
        with pytest.raises(ServerError):
            await client.generate(request())
    assert server.calls.count("/generate") == 1


async def test_a_control_call_is_tried_again():
    server = FakeServer(faults=[Fault("/pause_generation", "error", 2)])
    async with client_of(server) as client:
        await client.pause()
    assert server.paused
    assert server.calls.count("/pause_generation") == 3


async def test_a_weight_operation_is_sent_once_and_its_refusal_is_data():
    server = FakeServer(faults=[Fault("/update_weights_from_disk", "refuse")])
    async with client_of(server) as client:
        reply = await client.update("/update_weights_from_disk", {"model_path": "x"})
    assert (reply.success, reply.message) == (False, "refused")
    assert server.calls.count("/update_weights_from_disk") == 1


async def test_a_server_that_hangs_is_given_up_at_the_deadline():
    server = FakeServer(faults=[Fault("/generate", "hang")])
    async with client_of(server, request_timeout_s=0.1) as client:
        with pytest.raises(ServerError, match=r"did not answer within 0\.1 s"):
            await client.generate(request())


async def test_a_flush_that_is_refused_is_false():
    server = FakeServer(faults=[Fault("/flush_cache", "refuse")])
    async with client_of(server) as client:
        assert not await client.flush_cache()
        assert await client.flush_cache()


async def test_the_key_is_sent_and_never_shown():
    async with client_of(FakeServer(api_key="hush"), api_key="hush") as client:
        await client.generate(request())
    async with client_of(FakeServer(api_key="hush"), api_key="wrong-one") as client:
        with pytest.raises(RequestError, match="401: Unauthorized") as error:
            await client.generate(request())
        assert "wrong-one" not in str(error.value)


async def test_no_call_waits_until_others_give_their_connections_back():
    # An abort or a health check behind thousands of generations would count as failed.
    async with new_session() as session:
        assert session.connector.limit == 0
        assert session.connector.limit_per_host == 0


async def test_a_dead_server_is_not_healthy():
    server = FakeServer()
    async with new_session() as session:
        assert not await ServerClient("http://127.0.0.1:9", session).healthy()
    assert server.port == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "m"}', "m"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"[1]", "[1]"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_the_readable_part_of_an_error(content, message):
    assert error_message(content) == message


async def test_an_answer_that_is_none_names_the_server():
    server = FakeServer(info={"version": 5})
    async with client_of(server) as client:
        with pytest.raises(ServerError, match=f"{server.url} sent what is no ServerInfo"):
            await client.server_info()
