"""Calls between two processes, both ends in this one."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from lightning_grpo.errors import BusyError, ConfigError, RequestError, RolloutError
from lightning_grpo.session.pipe import Peer, RemoteTraceback, dumps, loads
from lightning_grpo.types import RouterShape, Routes, Trajectory


def test_a_trajectory_arrives_as_it_was_to_the_last_bit():
    routes = Routes(b"\x01\x02\x03\x04", RouterShape(1, 2, 8))
    sent = Trajectory(
        (5, 151_936, 0), (False, True, True), (0.0, -0.1, -1e-30), (-1, 7, 8), 0.5, {"a": 0.5},
        "text", truncated=True, transcript="all", routes=routes,
    )  # fmt: skip
    found = loads(dumps([sent]))[0]
    assert found == sent
    for name in ("input_ids", "response_mask", "logprobs", "versions"):
        assert [type(x) for x in getattr(found, name)] == [type(x) for x in getattr(sent, name)]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool],
)
def test_a_tensor_arrives_and_may_be_written_to(dtype):
    sent = torch.arange(6).reshape(2, 3).to(dtype)
    found = loads(dumps(sent))
    assert torch.equal(found.to(torch.complex64), sent.to(torch.complex64))
    assert found.dtype is dtype
    found[0] = 1


def test_a_sparse_and_a_negated_tensor_arrive():
    sent = torch.tensor([1j]).conj()
    assert torch.equal(loads(dumps(sent.imag)), sent.imag)
    assert loads(dumps(torch.eye(2).to_sparse())).is_sparse


class OddError(Exception):
    """Its constructor takes other arguments than it keeps."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")
        self.left, self.lock = left, threading.Lock()


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ConfigError("limits.x", "must be > 0", 1, "Raise it."), ("setting", "rule", "way_out")),
        (BusyError("later", 3.0), ("wait_s",)),
        (RequestError("no", 404), ("status",)),
        (OddError(1, 2), ("left",)),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ("object", "reason")),
        (SyntaxError("bad", ("own.py", 1, 2, "x")), ("msg", "lineno")),
        (SystemExit(3), ("code",)),
        (OSError(28, "No space left on device", "file"), ("errno", "filename")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_arrives_as_itself(error, kept):
    found = loads(dumps(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert all(getattr(found, name) == getattr(error, name) for name in kept)


@pytest.fixture
def pair():
    """Two ends of one pipe."""
    left, right = socket.socketpair()
    ends = [Peer(each, lambda: RolloutError("the other end is gone")) for each in (left, right)]
    yield ends
    for end in ends:
        end.close()


def test_both_ends_call_each_other(pair):
    ours, theirs = pair
    ours.handlers["half"] = lambda x: x / 2
    for each in (ours, theirs):
        each.start()
    # A handler that waits for the other end waits for its reader, not for its own.
    asked: Future[float] = Future()
    theirs.handlers["later"] = lambda: asked
    waiting = ours.call("later")
    assert theirs.call("half", 7).result(10) == 3.5
    asked.set_result(1.5)
    assert waiting.result(10) == 1.5


def test_an_error_of_a_handler_comes_with_its_traceback(pair):
    ours, theirs = pair

    def fail():
        raise ConfigError("a", "must be b", 1)

    theirs.handlers["fail"] = fail
    for each in (ours, theirs):
        each.start()
    with pytest.raises(ConfigError, match="`a` must be b, got 1") as failed:
        ours.call("fail").result(10)
    assert isinstance(failed.value.__cause__, RemoteTraceback)
    assert "in fail" in str(failed.value.__cause__)


def test_an_answer_that_cannot_travel_is_an_error_and_not_a_silence(pair):
    ours, theirs = pair
    theirs.handlers["lock"] = threading.Lock
    for each in (ours, theirs):
        each.start()
    with pytest.raises(TypeError, match="pickle"):
        ours.call("lock").result(10)


def test_calls_are_taken_in_their_order(pair):
    ours, theirs = pair
    taken = []
    theirs.handlers |= {"note": taken.append, "noted": lambda: list(taken)}
    for each in (ours, theirs):
        each.start()
    for number in range(100):
        ours.tell("note", number)
    assert ours.call("noted").result(10) == list(range(100))


def test_a_cancelled_question_cancels_what_it_began(pair):
    ours, theirs = pair
    began, running = threading.Event(), Future()

    def begin():
        began.set()
        return running

    theirs.handlers["begin"] = begin
    for each in (ours, theirs):
        each.start()

    async def ask_and_leave():
        asking = asyncio.create_task(ours.ask("begin"))
        await asyncio.to_thread(began.wait, 10)
        asking.cancel()
        await asyncio.wait([asking])
        return asking.cancelled()

    assert asyncio.run(ask_and_leave())
    assert running.cancelled()


def test_an_answer_that_nobody_waits_for_any_more_does_not_end_the_reading(pair):
    ours, theirs = pair
    late: Future[int] = Future()
    theirs.handlers |= {"late": lambda: late, "seven": lambda: 7}
    for each in (ours, theirs):
        each.start()
    ours.call("late").cancel()
    late.set_result(1)
    assert ours.call("seven").result(10) == 7


def test_whoever_waits_hears_that_the_other_end_is_gone_also_who_asks_later(pair):
    ours, theirs = pair
    theirs.handlers["never"] = Future
    for each in (ours, theirs):
        each.start()
    waiting = ours.call("never")
    theirs.close()
    with pytest.raises(RolloutError, match="the other end is gone"):
        waiting.result(10)
    with pytest.raises(RolloutError, match="the other end is gone"):
        ours.call("never").result(10)


def test_large_messages_pass_whole(pair):
    ours, theirs = pair
    theirs.handlers["sum"] = lambda array: int(array.sum())
    for each in (ours, theirs):
        each.start()
    array = np.ones(20_000_000, np.int8)
    assert ours.call("sum", array).result(30) == 20_000_000
