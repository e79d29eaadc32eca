import asyncio
from concurrent.futures import Future

import pytest

from lightning_grpo.weights.proof import promised, settled


def test_an_error_reaches_whoever_waits_for_what_was_promised():
    kept, broken = Future(), Future()

    def fail():
        with promised(kept, broken):
            kept.set_result(1)
            raise ArithmeticError

    async def wait():
        return await settled(broken)

    with pytest.raises(ArithmeticError):
        fail()
    assert kept.result() == 1
    with pytest.raises(ArithmeticError):
        asyncio.run(wait())


def test_what_is_there_needs_no_waiting():
    assert asyncio.run(settled([[0.0]])) == [[0.0]]
