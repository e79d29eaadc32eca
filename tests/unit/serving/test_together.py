"""Requests for one prompt share an exchange; each gets its reply, and the last to go ends it."""

import asyncio

import pytest

from lightning_grpo.errors import ServerError
from lightning_grpo.serving.client import GenerateReply, GenerateRequest, MetaInfo
from lightning_grpo.serving.pool import Together

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Client:
    """Answers with the number in each request's name, once it is allowed to."""

    def __init__(self, error=None):
        self.exchanges = []
        self.open = asyncio.Event()
        self.cancelled = 0
        self.error = error

    async def generate_together(self, requests):
        self.exchanges.append([request.rid for request in requests])
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [GenerateReply(MetaInfo(), [int(request.rid)]) for request in requests]


def ask(together, client, name, prompt=(1, 2)):
    request = GenerateRequest(list(prompt), {}, return_logprob=True, rid=str(name))

    async def generate():
        return await together.join(client, request).reply(request)

    return asyncio.create_task(generate())


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_those_of_one_moment_and_prompt_share_an_exchange_and_each_gets_its_reply():
    together, client = Together(), Client()
    tasks = [ask(together, client, i, prompt=[7, i % 2]) for i in range(6)]
    await settle()
    later = ask(together, client, 9, prompt=[7, 0])
    await settle()
    client.open.set()
    replies = await asyncio.gather(*tasks, later)
    assert [reply.output_ids for reply in replies] == [[0], [1], [2], [3], [4], [5], [9]]
    assert client.exchanges == [["0", "2", "4"], ["1", "3", "5"], ["9"]]


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
