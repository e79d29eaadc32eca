"""What comes at once goes on a few at a time."""

import asyncio

import anyio
import pytest

from lightning_grpo.serving.event_loop import Background, ClosedError, FairTurns, in_turns

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def turns_until(done):
    """How many turns of the loop it takes."""
    turns = 0
    while not done():
        await asyncio.sleep(0)
        turns += 1
    return turns


async def test_functions_are_called_in_order_a_few_in_each_turn():
    called = []
    in_turns([lambda n=n: called.append(n) for n in range(100)], at_once=10)
    assert called == list(range(10))
    assert await turns_until(lambda: len(called) == 100) >= 9
    assert called == list(range(100))


async def test_one_who_comes_alone_does_not_wait():
    turns = FairTurns()
    for _ in range(50):
        await asyncio.wait_for(turns.take(), 1)
        await asyncio.sleep(0)


async def test_those_who_come_at_once_go_in_order_and_few_in_each_turn():
    turns, gone, in_turn, most = FairTurns(), [], [0], [0]

    async def go(number):
        await turns.take()
        gone.append(number)
        in_turn[0] += 1
        most[0] = max(most[0], in_turn[0])

    tasks = [asyncio.create_task(go(n)) for n in range(200)]
    while len(gone) < 200:
        in_turn[0] = 0
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert gone == list(range(200))
    assert most[0] <= 32


async def test_one_who_leaves_while_it_waits_holds_nobody_up():
    turns = FairTurns()
    tasks = [asyncio.create_task(turns.take()) for _ in range(60)]
    await asyncio.sleep(0)
    for task in tasks[10:50]:
        task.cancel()
    done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert sum(isinstance(each, asyncio.CancelledError) for each in done) == 40


async def test_what_runs_for_a_guest_ends_with_the_group_and_before_it_is_left():
    unwound = []

    async def wait():
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.02)
            unwound.append(True)

    async def visit(background):
        with pytest.raises(ClosedError):
            await background.run(wait)

    async with anyio.create_task_group() as tasks:
        async with Background() as background:
            tasks.start_soon(visit, background)
            await anyio.sleep(0.01)
        assert unwound


async def test_a_guest_gets_its_result_and_its_own_error():
    async def give(value):
        if value is None:
            raise ValueError("none")
        return value

    async with Background() as background:
        assert await background.run(give, 3) == 3
        with pytest.raises(ValueError, match="none"):
            await background.run(give, None)
        background.check()
