import asyncio
import errno
import logging
import time
from contextlib import asynccontextmanager
from email.utils import formatdate

import aiohttp
import pytest
from aiohttp import web

from lightning_grpo.errors import (
    BusyError,
    OwnLimitError,
    ReplyError,
    RequestError,
    ServerError,
)
from lightning_grpo.serving.client import (
    LONGEST_WAIT_S,
    ServerClient,
    error_message,
    new_session,
    own_limit,
    seconds_to_wait,
)
from lightning_grpo.serving.wire import GenerateRequest, bytes_of, sampling_params
from lightning_grpo.types import Sampling
from tests.fakes.listening import listen
from tests.fakes.server import FakeServer, Fault

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def client_of(server, api_key=None, **options):
    async with server, new_session(api_key) as session:
        yield ServerClient(server.url, session, **options)


def request(ids=(1, 2), max_new_tokens=3):
    params = sampling_params(Sampling(), max_new_tokens=max_new_tokens, min_new_tokens=0, seed=None)
    return GenerateRequest(list(ids), params, True, rid="r")


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


async def test_what_is_asked_again_is_told_in_our_own_words_once(caplog):
    caplog.set_level(logging.INFO)
    server = FakeServer(faults=[Fault("/pause_generation", "error")])
    async with client_of(server) as client:
        await client.pause()
    (told,) = [record.message for record in caplog.records if record.name != "aiohttp.access"]
    assert told.startswith(f"{server.url}/pause_generation answered 500: Internal Server Error;")
    assert "asked again in 0.05 s" in told


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("2", 2.0),
        ("0.5", 0.5),
        ("0", 0.0),
        ("-7", 0.0),
        ("86400", LONGEST_WAIT_S),
        ("1e300", LONGEST_WAIT_S),
        ("inf", LONGEST_WAIT_S),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 9999 07:28:00 GMT", LONGEST_WAIT_S),
        ("Wed, 41 Oct 2025 07:28:00 GMT", None),
        ("21 Oct 99999999999 07:28:00 GMT", None),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(header, seconds):
    assert seconds_to_wait(header) == seconds


def test_a_server_may_ask_for_a_pause_until_a_date():
    assert 28.0 < seconds_to_wait(formatdate(time.time() + 30, usegmt=True)) <= 30.0


CONTROL = {
    "/pause_generation": lambda client: client.pause(),
    "/model_info": lambda client: client.model_info(),
    "/update_weight_version": lambda client: client.update_weight_version("run:1"),
    "/flush_cache": lambda client: client.flush_cache(),
    "/generate": lambda client: client.score([1, 2, 3]),
    "/begin_weight_update": lambda client: client.update("/begin_weight_update"),
}


@pytest.mark.parametrize(
    ("path", "status", "retry_after"),
    [
        *((path, 503, "0.001") for path in CONTROL),
        ("/generate", 429, "0.001"),
        ("/generate", 429, None),
        ("/generate", 503, "0"),
    ],
)
async def test_a_busy_server_is_waited_for_and_that_is_no_attempt(path, status, retry_after):
    busy = Fault(path, "busy", 4, status=status, retry_after=retry_after)
    server = FakeServer(faults=[busy])
    async with client_of(server) as client:
        assert await CONTROL[path](client) is not False
    assert server.calls.count(path) == 5


@pytest.mark.parametrize("status", [500, 502, 504])
async def test_another_5xx_is_a_fault_and_an_attempt(status):
    server = FakeServer(faults=[Fault("/pause_generation", "busy", 3, status=status)])
    async with client_of(server) as client:
        with pytest.raises(ServerError, match=f"answered {status}") as error:
            await client.pause()
    assert not isinstance(error.value, BusyError)
    assert server.calls.count("/pause_generation") == 3


async def test_a_busy_server_is_left_by_a_generation_at_once():
    server = FakeServer(faults=[Fault("/generate", "busy", retry_after="7")])
    async with client_of(server) as client:
        with pytest.raises(BusyError, match="the queue is full") as error:
            await client.generate(request())
    assert error.value.wait_s == 7.0


@pytest.mark.parametrize(
    ("status", "retry_after", "healthy"),
    [(503, None, False), (503, "5", True), (429, "5", True), (500, "5", False)],
)
async def test_a_server_that_wants_a_check_later_lives(status, retry_after, healthy):
    fault = Fault("/health", "busy", status=status, retry_after=retry_after)
    async with client_of(FakeServer(faults=[fault])) as client:
        assert await client.healthy() is healthy
        assert f"answered {status}" in client.trouble


SPOILED_SCORES = {
    "too few": lambda entries: entries.pop(),
    "of other tokens": lambda entries: entries.__setitem__(1, [-1.0, 9, None]),
    "above 0": lambda entries: entries.__setitem__(2, [0.5, 2, None]),
    "none": lambda entries: entries.__setitem__(2, [None, 2, None]),
}


@pytest.mark.parametrize("how", SPOILED_SCORES)
async def test_scores_that_can_not_be_are_refused(how):
    server = FakeServer(
        spoil_scores=lambda reply: SPOILED_SCORES[how](reply["meta_info"]["input_token_logprobs"])
    )
    async with client_of(server) as client:
        with pytest.raises(ReplyError, match=server.url):
            await client.score([3, 1, 2])


@asynccontextmanager
async def answering(content, **headers):
    """A server that answers everything so."""

    async def answer(request):
        await request.read()
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(content)
        return response

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.01)
    await runner.setup()
    listener = listen()
    await web.SockSite(runner, listener).start()
    async with new_session() as session:
        yield ServerClient(f"http://127.0.0.1:{listener.getsockname()[1]}", session)
    await runner.cleanup()


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"meta_info": {"finish_reason": {"type": "\xff"}}}',
        b'{"meta_info": {}, "output_ids": [1.0]}',
        b'{"meta_info": {}, "output_ids": [true]}',
        b'{"meta_info": {"output_token_logprobs": [[NaN, 1, null]]}, "output_ids": [1]}',
        b'{"meta_info": {"output_token_logprobs": [[1e999, 1, null]]}, "output_ids": [1]}',
        b"null",
        b"",
    ],
)
async def test_an_answer_that_can_not_be_read_is_refused_by_name(content):
    async with answering(content) as client:
        with pytest.raises(ReplyError, match=f"{client.url} sent what is no GenerateReply"):
            await client.generate(request())


@pytest.mark.parametrize("told", [True, False])
async def test_an_answer_that_is_longer_than_any_is_not_read(told):
    content = b" " * (bytes_of(3) + 1)
    headers = {"Content-Length": str(len(content))} if told else {}
    async with answering(content, **headers) as client:
        with pytest.raises(ReplyError, match="answers with more than 1050112 bytes"):
            await client.generate(request())


async def test_an_answer_is_not_unpacked():
    async with answering(b"\x1f\x8b" + b"0" * 100, **{"Content-Encoding": "gzip"}) as client:
        with pytest.raises(ReplyError):
            await client.generate(request())


class Session:
    """Lacks something of this process's own `times` times; answers 200 then."""

    def __init__(self, number, times):
        self.number, self.times, self.asked = number, times, 0

    def request(self, *args, **kwargs):
        self.asked += 1
        return self

    async def __aenter__(self):
        if self.asked <= self.times:
            raise aiohttp.ClientOSError(self.number, "no")
        return self

    async def __aexit__(self, *error):
        pass

    status, content_length = 200, 2

    async def read(self):
        return b"{}"


OWN = [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOMEM, errno.ENOBUFS]


@pytest.mark.parametrize("number", OWN)
async def test_what_this_process_lacks_is_waited_for_and_told_once(number, caplog):
    session = Session(number, times=4)
    await ServerClient("http://s:1", session).pause()
    assert session.asked == 5
    (told,) = [record.message for record in caplog.records]
    assert "http://s:1" not in told
    assert ("`ulimit -n`" in told) is (number == errno.EMFILE)


async def test_what_this_process_lacks_says_nothing_of_a_servers_health():
    for check in ("healthy", "listens"):
        with pytest.raises(OwnLimitError):
            await getattr(ServerClient("http://s:1", Session(errno.EMFILE, 1)), check)()
    with pytest.raises(OwnLimitError):
        await ServerClient("http://s:1", Session(errno.EMFILE, 1)).generate(request())


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, None])
def test_other_errors_of_a_connection_are_the_servers(number):
    assert own_limit(OSError(number, "no")) is None


async def test_many_generations_that_end_at_once_are_read_a_few_at_a_time():
    server = FakeServer()
    async with client_of(server) as client:
        replies = await asyncio.gather(*(client.generate(request()) for _ in range(100)))
    assert len(replies) == 100
