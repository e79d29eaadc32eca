import asyncio
from concurrent.futures import Future

import pytest

from lightning_grpo.errors import StopRun
from lightning_grpo.weights.proof import TrainerFailedError, promised, settled


@pytest.mark.parametrize("error", [ArithmeticError, StopRun, KeyboardInterrupt])
def test_an_error_reaches_whoever_waits_for_what_was_promised_and_never_ends_the_loop(error):
    kept, broken = Future(), Future()

    def fail():
        with promised(kept, broken):
            kept.set_result(1)
            raise error

    async def wait():
        with pytest.raises(TrainerFailedError, match=error.__name__) as failed:
            await settled(broken)
        assert isinstance(failed.value.__cause__, error)

    with pytest.raises(error):
        fail()
    assert kept.result() == 1
    asyncio.run(wait())


def test_what_is_there_needs_no_waiting():
    assert asyncio.run(settled([[0.0]])) == [[0.0]]
