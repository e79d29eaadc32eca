"""Streams whose reader is slow."""

from __future__ import annotations

import pytest

from lightning_grpo.engine.replies import Unread
from lightning_grpo.engine.requests import Output


def output(*ids: int) -> Output:
    return Output(list(ids), [0.0] * len(ids), None, (), "default", None, 0, 0)


@pytest.mark.anyio
async def test_a_reader_who_is_slow_is_told_the_newest_of_each_completion_in_turn():
    unread = Unread()
    unread.put(0, output(5))
    assert await unread.get() == (0, output(5))
    for length in range(1, 1000):
        unread.put(length % 3, output(*range(length)))
    told = [await unread.get() for _ in range(3)]
    assert [(index, len(out.token_ids)) for index, out in told] == [(1, 997), (2, 998), (0, 999)]
    unread.put(1, output(7))
    assert await unread.get() == (1, output(7))
