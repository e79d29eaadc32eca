"""Connections that ask for nothing, and keys."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest

from lightning_grpo.engine.http import Door
from lightning_grpo.keys import bears


class Echo(asyncio.Protocol):
    """Sends back what it gets, once the door has been told."""

    door: Door
    answers = False

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.door.heard(self.transport)
        self.transport.write(data)
        if self.answers:
            self.door.answered(self.transport)


class Answering(Echo):
    """Says when nothing more is asked for."""

    answers = True


@contextlib.asynccontextmanager
async def listening(room: int, head_s: float = 60.0, protocol: type[Echo] = Echo):
    door = Door(protocol, room, head_s)
    Echo.door = door
    server = await door.listen("127.0.0.1", 0)
    opened: list[asyncio.StreamWriter] = []

    async def connect():
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        opened.append(writer)
        return reader, writer

    try:
        yield connect
    finally:
        for writer in opened:
            writer.close()
        server.close()


async def asked(reader, writer) -> bytes:
    with contextlib.suppress(ConnectionError):
        writer.write(b"a")
        return await reader.read(1)
    return b""


@pytest.mark.anyio
async def test_a_thousand_silent_connections_keep_nobody_out_and_are_told_of_in_a_line(caplog):
    async with listening(room=20) as connect:
        busy = [await connect() for _ in range(10)]
        assert [await asked(*each) for each in busy] == [b"a"] * 10
        for _ in range(1000):
            await connect()
        assert [await asked(*each) for each in busy] == [b"a"] * 10
        assert await asked(*await connect()) == b"a"
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["all 20 connections are taken" in line.getMessage() for line in lines] == [True]


@pytest.mark.anyio
async def test_one_that_is_busy_is_not_closed_for_a_newcomer():
    async with listening(room=3) as connect:
        busy = [await connect() for _ in range(3)]
        assert [await asked(*each) for each in busy] == [b"a"] * 3
        assert await asked(*await connect()) == b""
        assert [await asked(*each) for each in busy] == [b"a"] * 3
        busy[0][1].close()
        await busy[0][1].wait_closed()
        await asyncio.sleep(0)
        assert await asked(*await connect()) == b"a"


@pytest.mark.anyio
async def test_one_that_was_answered_stays_while_there_is_room_and_then_goes_first():
    async with listening(room=3, head_s=0.05, protocol=Answering) as connect:
        answered = [await connect() for _ in range(3)]
        assert [await asked(*each) for each in answered] == [b"a"] * 3
        await asyncio.sleep(0.2)
        assert [await asked(*each) for each in answered] == [b"a"] * 3
        assert await asked(*await connect()) == b"a"
        assert [await asked(*each) for each in answered] == [b"", b"a", b"a"]


@pytest.mark.anyio
async def test_a_connection_that_never_asks_is_closed():
    async with listening(room=3, head_s=0.05) as connect:
        reader, _ = await connect()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer k", "bearer key", "key", "Bearer ké"]
)
def test_only_the_key_itself_opens(header):
    assert not bears(header, "key")
    assert bears("Bearer key", "key")
