"""The channel of one process, and the parts of the channel that need no second process."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import msgspec
import pytest
import torch.distributed as dist

from lightning_grpo.distributed import RankChannel
from lightning_grpo.distributed.channel import most_urgent, signal_of, urgency, what_happened
from lightning_grpo.distributed.heartbeat import (
    Failure,
    Heart,
    Kind,
    Pulse,
    RankLedger,
    RunningClock,
    SignedStore,
    WaitOutcome,
    is_echo,
    this_machine,
)
from lightning_grpo.errors import RankError, StopRun


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def ledger(
    rank: int = 1, world_size: int = 2, rank_timeout_s: float = 10.0
) -> tuple[RankLedger, Time]:
    time = Time()
    clock = RunningClock(5.0, time)
    return RankLedger(rank, world_size, "pid 1 on here", rank_timeout_s, clock), time


def done(value: object = None, error: Exception | None = None) -> Future:
    future: Future = Future()
    future.set_result(value) if error is None else future.set_exception(error)
    return future


def pass_time(clock: RunningClock, time: Time, seconds: float) -> None:
    for _ in range(int(seconds)):
        time.now += 1.0
        clock.now()


def test_one_process_waits_without_store_or_group():
    channel = RankChannel.single()
    assert channel.wait(done("batch"), what="a batch") == "batch"
    assert channel.wait(None, what="nothing") is None
    assert channel.on_rank_zero(lambda: 3, what="three") == 3
    assert channel.broadcast([1]) == [1]
    assert channel.scatter(["mine"]) == "mine"
    assert channel.gather("mine") == ["mine"]
    channel.start_watchdog()
    channel.close()
    assert not dist.is_initialized()


def test_the_error_of_the_work_is_raised_as_it_is():
    error, channel = ZeroDivisionError("by hand"), RankChannel.single()
    with pytest.raises(ZeroDivisionError) as caught:
        channel.wait(done(error=error), what="a batch")
    assert caught.value is channel.failed_wait is error


def test_what_rank_zero_fails_in_itself_is_no_failure_of_what_is_waited_for():
    channel = RankChannel.single()
    with pytest.raises(ZeroDivisionError):
        channel.on_rank_zero(lambda: 1 // 0, what="a proof")
    assert channel.failed_wait is None


def test_a_signal_ends_the_wait_of_one_process_with_the_shell_status():
    channel = RankChannel.single(poll_s=0.001)
    channel.stop_source = lambda: "SIGINT"
    with pytest.raises(StopRun, match="SIGINT while waiting for a batch") as caught:
        channel.wait(Future(), what="a batch")
    assert (caught.value.signal, caught.value.code) == (2, 130)
    assert channel.agree_on_stop() == "SIGINT"


def test_work_that_does_not_end_soon_after_a_signal_is_waited_for_no_longer():
    channel = RankChannel.single(poll_s=0.001)
    channel.stop_source = lambda: "SIGTERM"
    with pytest.raises(StopRun, match="SIGTERM while waiting for a weight sync"):
        channel.wait(Future(), what="a weight sync", stop_after_s=0.02)


def test_work_that_ends_soon_after_a_signal_is_waited_for():
    channel = RankChannel.single(poll_s=0.001)
    future: Future = Future()
    polls = iter(range(5))

    def signal_source() -> str:
        if next(polls) == 4:
            future.set_result("synced")
        return "SIGTERM"

    channel.stop_source = signal_source
    assert channel.wait(future, what="a weight sync", stop_after_s=60.0) == "synced"


def test_a_wait_past_its_deadline_says_what_took_too_long():
    with pytest.raises(RankError, match=r"a sync took longer than 0\.01 s"):
        RankChannel.single(poll_s=0.001).wait(Future(), what="a sync", deadline_s=0.01)


def test_a_pulse_survives_the_store():
    pulse = Pulse(3, 4, "pid", "x", 5.0, "SIGTERM", 6, True, Failure(1, "tb\n"))
    pulse = Pulse(outcomes=(WaitOutcome(1, Kind.STOP, "w", "SIGTERM", 9),), failure=pulse.failure)
    assert msgspec.json.decode(msgspec.json.encode(pulse), type=Pulse) == pulse


def test_an_error_that_no_text_can_hold_is_told_all_the_same():
    said = what_happened(ValueError("a file called \ud800"))
    pulse = Pulse(failure=Failure(0, said))
    assert msgspec.json.decode(msgspec.json.encode(pulse), type=Pulse) == pulse
    assert r"a file called \ud800" in said


def test_a_rank_that_beats_is_not_silent_and_one_that_stops_is_named():
    book, time = ledger()
    for tick in range(1, 30):
        pass_time(book.clock, time, 5)
        book.hear({0: Pulse(tick, what="training", name="pid 7 on there")})
        assert book.verdict() is None
    pass_time(book.clock, time, 11)
    failure = book.verdict()
    assert failure is not None
    assert failure.rank == 0
    assert "pid 7 on there" in failure.text
    assert "training" in failure.text


def test_the_time_this_process_stood_still_is_not_held_against_others():
    book, time = ledger()
    book.hear({0: Pulse(1)})
    time.now += 3600.0  # SIGSTOP, or the lid of a laptop
    assert book.verdict() is None


def test_a_main_thread_may_be_busy_for_as_long_as_it_declared():
    book, time = ledger()
    book.hear({0: Pulse(1, 1, what="export", allowance_s=20.0)})
    since = book.clock.now()
    pass_time(book.clock, time, 29)
    assert book.stalled(since) is None
    pass_time(book.clock, time, 2)
    stalled = book.stalled(since)
    assert stalled is not None
    assert "last known in: export" in stalled.text


def test_a_rank_that_left_in_good_order_is_not_missed():
    book, time = ledger(rank=0, world_size=3)
    book.hear({1: Pulse(1, closed=True), 2: Pulse(1)})
    pass_time(book.clock, time, 11)
    failure = book.verdict()
    assert failure is not None
    assert failure.rank == 2
    assert book.mine.failure == failure  # rank 0 passes it on


def test_outcomes_are_kept_until_every_rank_has_read_them():
    book, _ = ledger(rank=0, world_size=3)
    tick = book.publish(WaitOutcome(1, Kind.READY, "a batch"))
    assert book.next_beat().tick == tick
    book.hear({1: Pulse(1, seen=tick), 2: Pulse(1, seen=tick - 1)})
    assert [o.sequence for o in book.next_beat().outcomes] == [1]
    assert not book.all_have_seen(tick)
    book.hear({2: Pulse(2, seen=tick)})
    assert book.all_have_seen(tick)
    assert book.next_beat().outcomes == ()


def test_the_first_failure_wins():
    book, _ = ledger(rank=0, world_size=3)
    book.hear({2: Pulse(1, failure=Failure(2, "first"))})
    book.hear({1: Pulse(1, failure=Failure(1, "second"))})
    assert book.failure == Failure(2, "first")
    assert book.mine.failure == Failure(2, "first")


class Ended:
    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


@pytest.mark.parametrize(
    ("code", "expected"), [(None, None), (0, None), (-9, "SIGKILL"), (3, "exit status 3")]
)
def test_a_child_that_ended_badly_is_noticed_at_once(code, expected):
    book, _ = ledger(rank=0)
    book.processes[1] = Ended(code)
    failure = book.verdict()
    assert (failure is None) if expected is None else (expected in failure.text)


def test_errors_of_broken_collectives_are_known_as_echoes():
    assert is_echo(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not is_echo(RuntimeError("shapes do not match"))
    assert not is_echo(ValueError("gloo"))


class DictStore:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]

    def beat(self, rank: int, pulse: Pulse) -> None:
        self.values[f"pulse/{rank}"] = msgspec.json.encode(pulse)


def test_what_somebody_else_writes_into_the_store_is_read_as_nothing():
    inner = DictStore()
    store = SignedStore(inner, b"secret")
    store.set("pulse/1", "beat 1")
    assert store.multi_get(["pulse/1"]) == [b"beat 1"]
    assert b"secret" not in inner.values["pulse/1"]
    genuine = inner.values["pulse/1"]
    code = genuine.partition(b" ")[0]
    for forged in (b"not json", b"", b" ", b"\xff\x00", code, code + b" beat 2", genuine + b"!"):
        inner.values["pulse/1"] = forged
        assert store.multi_get(["pulse/1"]) == [b""]
    inner.values["pulse/2"] = genuine  # of another rank
    assert store.multi_get(["pulse/2"]) == [b""]
    assert SignedStore(inner, b"another run's").multi_get(["pulse/2"]) == [b""]


@pytest.mark.parametrize("junk", [b"not json", b"", b"[]", b"{}", b"null", b'{"tick": 1}', b"\xff"])
def test_a_record_that_can_not_be_read_is_skipped_and_told_once(junk, caplog):
    book, _ = ledger(rank=0, rank_timeout_s=0.05)
    store = DictStore()
    store.beat(1, Pulse(7, what="training"))
    heart = Heart(book, store, stop_source=str)
    heart.start()
    wait_for(lambda: book.peers[1].pulse.tick == 7)
    beats = book.mine.tick
    store.values["pulse/1"] = junk
    wait_for(lambda: book.mine.tick > beats + 3)
    assert book.peers[1].pulse.what == "training"
    store.beat(1, Pulse(8, what="on"))
    wait_for(lambda: book.peers[1].pulse.tick == 8)
    heart.stop()
    assert caplog.text.count("the record of rank 1 in the ranks' store was not written by it") == 1


def test_the_last_call_of_a_slow_store_is_waited_for():
    class SlowStore(DictStore):
        def __init__(self):
            super().__init__()
            self.entered, self.may_return = threading.Event(), threading.Event()

        def set(self, key, value):
            self.entered.set()
            assert self.may_return.wait(30.0)

    book, _ = ledger(rank=0, rank_timeout_s=0.05)
    store = SlowStore()
    store.values["pulse/1"] = b""
    heart = Heart(book, store, stop_source=str)
    heart.start()
    assert store.entered.wait(30.0)
    slow = threading.Timer(2.0, store.may_return.set)
    slow.start()
    heart.stop()
    assert not heart._thread.is_alive()
    slow.join()


def test_an_old_record_that_is_put_back_is_no_news():
    book, time = ledger()
    book.hear({0: Pulse(5, 2, what="new")})
    heard_at = book.peers[0].changed_at
    time.now += 1.0
    book.hear({0: Pulse(4, 1, what="old")})
    assert (book.peers[0].pulse.what, book.peers[0].changed_at) == ("new", heard_at)


def test_processes_of_one_machine_know_it_by_the_same_name():
    assert this_machine() == this_machine() != ""


# ---- which of several signals counts ------------------------------------------------------------


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["SIGUSR1", "SIGTERM", "", "SIGINT"]))
)
def test_a_request_to_run_again_outweighs_requests_to_end_in_any_order(order):
    assert most_urgent(order) == "SIGUSR1"


def test_no_signal_is_no_request():
    assert most_urgent([]) == most_urgent(["", ""]) == signal_of(urgency("")) == ""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGRTMAX"])
def test_a_number_that_travels_names_its_signal_again(name):
    assert signal_of(urgency(name)) == name
