"""Rows: appending, ending and moving requests as tensors."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from lightning_grpo.engine.requests import Request
from lightning_grpo.engine.slots import NOT_FINITE, Rows
from tests.fakes.engine_requests import PLAIN, VOCAB, ignore


def request(output: tuple[int, ...] = (), **changes: Any) -> Request:
    """A request that differs from the plain one in some ways."""
    return Request(
        msgspec.structs.replace(PLAIN, **changes),
        ignore,
        output_ids=list(output),
        output_logprobs=[-1.0] * len(output),
    )


def record(rows: Rows, tokens: list[int]) -> list[bool]:
    """Append one token to every row with logprob -0.5; which of them end."""
    reasons = rows.record(0, torch.tensor(tokens), torch.full((len(tokens),), -0.5))
    return [row in reasons for row in range(len(tokens))]


def test_rows_end_at_their_own_stop_ids_and_lengths() -> None:
    rows = Rows(4, VOCAB)
    rows.append([request(stop_ids=frozenset({5})), request(max_new_tokens=2)])
    rows.append([request(stop_ids=frozenset({6, 7, 8})), request()])
    assert record(rows, [6, 5, 5, 5]) == [False, False, False, False]
    assert record(rows, [5, 1, 8, 6]) == [True, True, True, False]


def test_a_logprob_that_is_not_finite_ends_a_row() -> None:
    rows = Rows(2, VOCAB)
    rows.append([request(), request()])
    ended = rows.record(0, torch.tensor([1, 1]), torch.tensor([float("nan"), -1.0]))
    assert ended == {0: NOT_FINITE}


def test_each_row_keeps_its_own_output() -> None:
    rows = Rows(2, VOCAB)
    rows.append([request(max_new_tokens=500), request(max_new_tokens=500)])
    for step in range(150):
        record(rows, [step % VOCAB, 3])
    first, second = rows.requests
    assert first.output_ids == [step % VOCAB for step in range(150)]
    assert first.output_logprobs == [-0.5] * 150
    assert second.output_ids == [3] * 150


def test_the_last_rows_fill_the_gaps_and_nothing_is_mixed_up() -> None:
    rows = Rows(5, VOCAB)
    requests = [request(rid=str(i), seed=i, stop_ids=frozenset({10 + i})) for i in range(5)]
    rows.append(requests)
    record(rows, [0, 1, 2, 3, 4])
    source, target = rows.remove([0, 3])
    assert (source.tolist(), target.tolist()) == ([4], [0])
    assert [r.generation.rid for r in rows.requests] == ["4", "1", "2"]
    assert [r.output_ids for r in rows.requests] == [[4], [1], [2]]
    assert rows.plan(0, 3).seeds.tolist() == [4, 1, 2]
    assert record(rows, [14, 10, 12]) == [True, False, True]
    source, target = rows.remove([0, 1, 2])
    assert len(rows) == len(source) == len(target) == 0


def test_a_request_that_comes_back_has_its_output() -> None:
    rows = Rows(2, VOCAB)
    rows.append([request(output=tuple(range(70)), max_new_tokens=72)])
    assert rows.lengths[0] == 73
    assert record(rows, [5]) == [False]
    assert record(rows, [6]) == [True]
    assert rows.requests[0].output_ids == [*range(70), 5, 6]


def test_end_tokens_are_banned_until_the_row_is_long_enough() -> None:
    rows = Rows(3, VOCAB)
    rows.append(
        [
            request(min_new_tokens=1, stop_ids=frozenset({4, 9})),
            request(stop_ids=frozenset({4})),
            request(),
        ]
    )
    banned = rows.banned(0, 3)
    assert banned is not None
    assert banned.nonzero().tolist() == [[0, 4], [0, 9]]
    record(rows, [1, 1, 1])
    again = rows.banned(0, 3)
    assert again is not None
    assert not bool(again.any())
    rows.remove([0])
    assert rows.banned(0, 2) is None


def test_the_plan_says_what_the_batch_needs() -> None:
    rows = Rows(3, VOCAB)
    rows.append([request()])
    plain = rows.plan(0, 1)
    needs = [plain.any_scaled, plain.any_greedy, plain.all_greedy, plain.any_filtered]
    assert not any(needs)
    rows.append([request(temperature=0.5, greedy=True), request(top_k=3)])
    mixed = rows.plan(0, 3)
    assert mixed.any_scaled
    assert mixed.any_greedy
    assert mixed.any_filtered
    assert not mixed.all_greedy
    assert rows.plan(1, 2).all_greedy
    assert mixed.temperatures.tolist() == [1.0, 0.5, 1.0]
