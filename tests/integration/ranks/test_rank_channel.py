"""Two real gloo ranks: what each sees when the other one fails, dies or stands still."""

from __future__ import annotations

import logging
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import pytest
import torch
import torch.distributed as dist

from lightning_grpo.distributed import RankChannel
from lightning_grpo.distributed.heartbeat import EXIT_RANK_LOST
from lightning_grpo.errors import RankError, StopRun
from tests.fakes.ranks import init_gloo, run_ranks, start_ranks

TIMEOUT_S = 2.5


def connect(rank_timeout_s: float = TIMEOUT_S) -> RankChannel:
    rank, world_size = init_gloo()
    channel = RankChannel.connect(rank, world_size, host="127.0.0.1", rank_timeout_s=rank_timeout_s)
    channel.start_watchdog(grace_s=0.5)
    return channel


def later(delay_s: float, value: object = None, error: Exception | None = None) -> Future:
    def work() -> object:
        time.sleep(delay_s)
        if error is not None:
            raise error
        return value

    return ThreadPoolExecutor(1).submit(work)


def wait_and_share() -> list[object]:
    channel = connect()
    seen: list[object] = []
    future = later(3 * TIMEOUT_S, "batch") if channel.rank == 0 else None
    seen.append(channel.wait(future, what="a rollout batch", deadline_s=60))
    for index in range(30):  # rank 0 may run ahead of the others' reading
        done = later(0.0, index) if channel.rank == 0 else None
        channel.wait(done, what=f"wait {index}")
    seen.append(channel.on_rank_zero(lambda: "by hand", what="a section", deadline_s=5))
    seen.append(channel.broadcast({"a": torch.arange(3)} if channel.rank == 0 else None)["a"])
    seen.append(channel.scatter([b"x" * 10, b"yy"] if channel.rank == 0 else None))
    seen.append(channel.gather(f"of rank {channel.rank}"))
    channel.close()
    channel.close()
    return seen


def test_ranks_wait_three_timeouts_for_rank_zero_and_then_share_objects():
    zero, one = run_ranks(wait_and_share)
    assert (zero[:2], one[:2]) == (["batch", "by hand"], [None, None])
    assert zero[2].tolist() == one[2].tolist() == [0, 1, 2]
    assert (zero[3], one[3]) == (b"x" * 10, b"yy")
    assert (zero[4], one[4]) == (["of rank 0", "of rank 1"], None)


def wait_for_a_failure() -> str:
    channel = connect()
    future = later(0.3, error=ValueError("the server is on fire")) if channel.rank == 0 else None
    try:
        channel.wait(future, what="a rollout batch")
    except (ValueError, RankError) as error:
        together = error is channel.failed_wait
        cause = channel.report_failure(error)
        channel.close()
        return f"{type(error).__name__}, together: {together}: {error} ({cause})"
    return "nothing"


def test_all_ranks_raise_when_the_work_of_rank_zero_fails():
    zero, one = run_ranks(wait_for_a_failure)
    assert zero == "ValueError, together: True: the server is on fire (None)"
    assert one.startswith("RankError, together: True: rank 0 failed")
    assert "ValueError: the server is on fire" in one
    assert "in work" in one  # the traceback came along


def wait_while_rank_one_fails() -> str:
    channel = connect()
    try:
        if channel.rank == 1:
            raise KeyError("bad batch")
        channel.wait(Future(), what="a rollout batch")
    except (KeyError, RankError) as error:
        channel.report_failure(error)
        channel.close()
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_rank_zero_ends_its_wait_when_another_rank_fails():
    zero, one = run_ranks(wait_while_rank_one_fails)
    assert zero.startswith("RankError: rank 1 failed")
    assert "KeyError: 'bad batch'" in zero
    assert one.startswith("KeyError")


def stop_while_waiting() -> tuple[int, int]:
    channel = connect()
    begun = time.monotonic()
    channel.stop_source = lambda: (
        "SIGTERM" if channel.rank == 1 and time.monotonic() > begun + 0.5 else ""
    )
    future = later(1.5) if channel.rank == 0 else None
    channel.wait(future, what="a weight sync", stop_after_s=60.0)
    try:
        channel.wait(Future() if channel.rank == 0 else None, what="a rollout batch")
    except StopRun as stop:
        channel.close()
        return stop.signal, stop.code
    return 0, 1


def test_a_signal_of_any_rank_stops_the_wait_of_all_but_not_a_section_that_must_end():
    assert run_ranks(stop_while_waiting) == [(15, 143), (15, 0)]


def out_of_step() -> str:
    channel = connect()
    try:
        channel.wait(
            later(0.1) if channel.rank == 0 else None, what=("A" if channel.rank == 0 else "B")
        )
        channel.wait(Future(), what="more")
    except RankError as error:
        channel.close()
        return str(error)
    return ""


def test_ranks_that_wait_for_different_things_say_so():
    zero, one = run_ranks(out_of_step)
    assert "out of step" in zero
    assert "out of step" in one


def deadline() -> str:
    channel = connect()
    try:
        channel.wait(Future() if channel.rank == 0 else None, what="a sync", deadline_s=0.5)
    except RankError as error:
        channel.close()
        return str(error)
    return ""


def test_a_wait_past_its_deadline_ends_on_all_ranks():
    for text in run_ranks(deadline):
        assert "a sync took longer than 0.5 s" in text


def hang(place: str) -> None:
    channel = connect()
    try:
        print("in place", flush=True)
        if place == "wait":
            channel.wait(Future() if channel.rank == 0 else None, what="a rollout batch")
        while True:  # "collective": a training step after the other
            dist.all_reduce(torch.ones(1000))
            channel.beat("training")
    except BaseException as error:
        cause = channel.report_failure(error)
        print(f"ENDED BY {cause or error}", flush=True)
        channel.close()
        raise


def _ends_naming(output: str, rank: int) -> bool:
    return f"rank {rank} failed" in output


@pytest.mark.parametrize(
    ("signum", "victim", "place"),
    [
        (signal.SIGKILL, 0, "wait"),
        (signal.SIGKILL, 1, "collective"),
        (signal.SIGSTOP, 0, "collective"),
        (signal.SIGSTOP, 1, "wait"),
        # The other half, by `make test-slow`.
        pytest.param(signal.SIGKILL, 0, "collective", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 1, "wait", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, "wait", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, "collective", marks=pytest.mark.slow),
    ],
)
def test_the_other_rank_ends_naming_the_one_that_was(signum, victim, place):
    other = 1 - victim
    with start_ranks(hang, 2, place) as ranks:
        ranks.wait_for("in place", 0)
        ranks.wait_for("in place", 1)
        time.sleep(0.5)
        ranks.kill(victim, signum)
        (result,) = ranks.join([other], timeout_s=20)
        assert result.returncode in (1, EXIT_RANK_LOST), result.output
        assert _ends_naming(result.output, victim), result.output
        if signum == signal.SIGSTOP:
            ranks.kill(victim, signal.SIGCONT)
        (late,) = ranks.join([victim], timeout_s=20)
        assert late.returncode in (1, EXIT_RANK_LOST, -signal.SIGKILL), late.output


def fail_in_collective() -> None:
    channel = connect()
    try:
        if channel.rank == 1:
            time.sleep(0.3)
            raise KeyError("bad batch")
        dist.all_reduce(torch.ones(10))
    except BaseException as error:
        cause = channel.report_failure(error)
        print(f"ENDED BY {cause or error}", flush=True)
        channel.close()
        if channel.rank == 1:
            time.sleep(4)  # a slow shutdown: its sockets stay open
        raise


def test_a_rank_in_a_collective_ends_when_another_one_reports_a_failure():
    with start_ranks(fail_in_collective, 2) as ranks:
        zero, one = ranks.join()
    assert zero.returncode == EXIT_RANK_LOST
    assert "rank 1 failed" in zero.output
    assert "KeyError: 'bad batch'" in zero.output
    assert "all_reduce" in zero.output  # where it was blocked
    assert one.returncode == 1


def live_beside_a_stranger() -> tuple[list[object], list[str]]:
    channel = connect()
    store = channel._store._store  # what a stranger has who found the port
    told: list[str] = []
    logging.getLogger("lightning_grpo.distributed.heartbeat").addHandler(Telling(told))
    seen: list[object] = []
    for index in range(5):
        if channel.rank == 0:
            stranger = dist.TCPStore("127.0.0.1", store.port, None, False, wait_for_workers=False)
            for name in ("pulse/0", "pulse/1"):
                stranger.set(name, "not json")
        seen.append(channel.wait(later(0.3, index) if channel.rank == 0 else None, what="a batch"))
    listens = {c.laddr.ip for c in psutil.net_connections() if c.laddr.port == store.port}
    channel.close()
    return seen, [*told, *listens]


class Telling(logging.Handler):
    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(record.getMessage())


def test_a_stranger_who_writes_into_the_store_ends_no_run_and_is_told_of():
    zero, one = run_ranks(live_beside_a_stranger)
    assert zero[0] == list(range(5))
    assert one[0] == [None] * 5
    assert any("not written by it" in text for text in [*zero[1], *one[1]])
    assert "127.0.0.1" in zero[1]
    assert not {"0.0.0.0", "::"} & {*zero[1], *one[1]}
