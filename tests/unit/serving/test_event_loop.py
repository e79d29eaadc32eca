"""What comes at once goes on a few at a time."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import selectors
import socket
import sys
import threading
import time
from contextlib import asynccontextmanager

import anyio
import pytest

from lightning_grpo.errors import ConfigError, RolloutError, ServersLostError
from lightning_grpo.serving.event_loop import (
    MOST_READY,
    SWITCH_INTERVAL_S,
    Background,
    ClosedError,
    EventLoop,
    FairTurns,
    SameTurn,
    SteadySelector,
    in_turns,
)
from tests.fakes.generator import FakeGenerator
from tests.fakes.rollouts import make_producer

pytestmark = pytest.mark.anyio


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


class Running:
    """A started service over fakes, and what to poke it with."""

    def __init__(self, service, generator, left):
        self.service, self.generator, self.left = service, generator, left
        self.failing = self.producer = None

    def take(self):
        return self.service.run(self.producer.take)

    @asynccontextmanager
    async def build(self, **options):
        self.failing = anyio.Event()

        async def server_watch():
            await self.failing.wait()
            raise ServersLostError("no server left")

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server_watch)
                async with make_producer(self.generator, **options) as self.producer:
                    yield
                tasks.cancel_scope.cancel()
        finally:
            self.left.append(threading.current_thread().name)


@pytest.fixture
def running():
    service = EventLoop()
    made = Running(service, FakeGenerator(lambda ids, n: 0.001), [])
    yield made
    service.close()


def start(running, **options):
    options.setdefault("batch_size", 2)
    running.service.start(lambda: running.build(**options))
    return running.service


def test_batches_come_through_futures_and_versions_go_in(running):
    service = start(running, max_staleness=0)
    for version in range(3):
        groups = running.take().result(timeout=10)
        assert [group.oldest_version for group in groups] == [version, version]
        running.generator.version = version + 1
        service.call(running.producer.advance, version + 1)
    assert service.call(lambda: running.producer.gate.version) == 3


def test_what_runs_on_the_loop_runs_in_another_thread(running):
    async def where():
        return threading.get_ident()

    assert start(running).run(where).result(timeout=10) != threading.get_ident()


def test_state_goes_out_and_in(running):
    service = start(running)
    producer = running.producer
    running.take().result(timeout=10)
    state = service.call(producer.state_dict)
    service.call(producer.load_state_dict, state)
    assert service.call(producer.state_dict)["counters"]["taken"] == 2


def test_an_error_in_the_producer_reaches_a_take_that_waits(running):
    running.generator.fail = lambda number: ConfigError("wrong") if number else None
    start(running)
    with pytest.raises(ConfigError, match="wrong"):
        running.take().result(timeout=10)


def test_an_error_beside_the_producer_reaches_whoever_waits_and_whoever_comes_later(running):
    running.generator.duration = lambda ids, n: 1000.0
    service = start(running)
    waiting = [running.take(), running.take(), service.run(running.producer.evaluate, [])]
    assert waiting[2].result(timeout=10) == []
    service.call(running.failing.set)
    for future in waiting[:2]:
        with pytest.raises(ServersLostError, match="no server left"):
            future.result(timeout=10)
    for late in (lambda: running.take().result(timeout=10), lambda: service.call(list)):
        with pytest.raises(ServersLostError, match="no server left"):
            late()


def test_an_error_at_the_start_is_raised_by_start_and_leaves_nothing(running):
    @asynccontextmanager
    async def build():
        raise ConfigError("no such model")
        yield

    with pytest.raises(ConfigError, match="no such model"):
        running.service.start(build)
    assert not running.service.is_live
    start(running)
    running.take().result(timeout=10)


@pytest.fixture
def of_python():
    """Python's own switch interval: the engine's program sets another for its process."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield sys.getswitchinterval()
    sys.setswitchinterval(before)


def test_while_it_runs_no_thread_keeps_the_interpreter_for_long(running, of_python):
    service = start(running)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    service.close()
    assert sys.getswitchinterval() == pytest.approx(of_python)


def test_it_starts_once(running):
    service = start(running)
    with pytest.raises(RolloutError, match="already running"):
        service.start(running.build)


def test_closing_wakes_those_who_wait_leaves_on_the_loop_and_may_come_twice(running):
    running.generator.duration = lambda ids, n: 1000.0
    service = start(running)
    waiting = running.take()
    time.sleep(0.05)
    service.close()
    service.close()
    with pytest.raises(RolloutError):
        waiting.result(timeout=10)
    with pytest.raises(RolloutError, match="not running"):
        running.take()
    assert running.generator.cancelled == 8
    assert running.left != [threading.current_thread().name]


def test_closing_after_a_failure_raises_nothing(running):
    service = start(running)
    service.call(running.failing.set)
    service.close()
    assert len(running.left) == 1


def test_a_service_never_started_closes():
    EventLoop().close()


def test_an_error_that_left_a_task_group_alone_is_raised_as_itself(running):
    service = start(running)

    async def refuse():
        raise ConfigError("no such thing")

    async def call():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refuse)

    with pytest.raises(ConfigError, match="no such thing"):
        service.run(call).result(timeout=10)


def test_a_cancelled_take_ends_alone(running):
    running.generator.duration = lambda ids, n: 1000.0
    service = start(running)
    running.take().cancel()
    running.generator.duration = lambda ids, n: 0.001
    assert service.call(running.producer.explain_wait).endswith("last errors: none")
    assert service.run(running.producer.evaluate, []).result(timeout=10) == []


def test_a_loop_that_was_held_up_says_for_how_long(running):
    service = start(running)
    service.call(time.sleep, 0.3)
    service.call(anyio.lowlevel.current_token)
    time.sleep(0.15)
    assert service.lag_s() > 0.15


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_loop_whose_thread_is_killed_says_so_to_who_waits_and_to_who_asks(running):
    loops = []

    async def never():
        loops.append(threading.get_ident())
        await anyio.sleep_forever()

    service = start(running)
    waiting = service.run(never)
    while not loops:
        time.sleep(0.01)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(loops[0]), ctypes.py_object(SystemExit)
    )
    with pytest.raises(RolloutError, match="event loop was ended from outside"):
        waiting.result(timeout=30)
    with pytest.raises(RolloutError, match="event loop was ended from outside"):
        service.call(list)
    with pytest.raises(RolloutError, match="event loop was ended from outside"):
        running.take()
    service.close()
    del waiting
    gc.collect()  # what the loop never began warns here, and not in a later test


def test_the_time_before_the_producer_runs_is_no_lag(running):
    service = running.service

    @asynccontextmanager
    async def slowly():
        await anyio.sleep(1.0)  # as servers take to start
        async with running.build(batch_size=2) as producer:
            yield producer

    service.start(slowly)
    time.sleep(0.15)
    assert service.lag_s() < 0.8


def test_many_sockets_that_are_ready_at_once_are_reported_in_parts_and_none_is_left_out():
    selector, pairs = SteadySelector(), [socket.socketpair() for _ in range(300)]
    try:
        for ours, theirs in pairs:
            selector.register(ours, selectors.EVENT_READ)
            theirs.send(b"x")
        seen, sizes = set(), []
        while len(seen) < 300:
            ready = selector.select(0)
            sizes.append(len(ready))
            for key, _ in ready:
                seen.add(key.fd)
                key.fileobj.recv(1)
        assert max(sizes) == MOST_READY
        assert selector.select(0) == []
    finally:
        selector.close()
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def test_what_is_asked_in_one_turn_is_asked_at_once_by_kind():
    asked = []

    async def answer(kind, questions):
        asked.append((kind, questions))
        return None if kind == "none" else [question * 2 for question in questions]

    async def main():
        gathered = SameTurn(answer)
        first = await asyncio.gather(
            gathered.ask("a", 1),
            gathered.ask("b", 2),
            gathered.ask("a", 3),
            gathered.ask("none", 4),
        )
        return first, await gathered.ask("a", 5)

    assert asyncio.run(main()) == ([2, 4, 6, None], 10)
    assert asked == [("a", [1, 3]), ("b", [2]), ("none", [4]), ("a", [5])]
