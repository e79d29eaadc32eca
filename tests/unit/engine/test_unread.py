"""Streams whose reader is slow."""

from __future__ import annotations

import pytest

from lightning_grpo.engine.batch import Output, Request
from lightning_grpo.engine.scheduler import Unread
from tests.fakes.engine_requests import PLAIN, ignore


def output(*ids: int) -> Output:
    return Output(Request(PLAIN, ignore, output_ids=list(ids)), len(ids), None, "default")


async def read(unread: Unread) -> tuple[int, list[int]]:
    index, read = await unread.get()
    return index, read.token_ids


@pytest.mark.anyio
async def test_a_reader_who_is_slow_is_told_the_newest_of_each_completion_in_turn():
    unread = Unread()
    unread.put(0, output(5))
    assert await read(unread) == (0, [5])
    for length in range(1, 1000):
        unread.put(length % 3, output(*range(length)))
    told = [await read(unread) for _ in range(3)]
    assert [(index, len(ids)) for index, ids in told] == [(1, 997), (2, 998), (0, 999)]
    unread.put(1, output(7))
    assert await read(unread) == (1, [7])
