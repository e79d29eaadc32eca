"""Rows of the running batch: they end, close their gaps, and say what the sampler needs."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from lightning_grpo.engine.batch import (
    NOT_FINITE,
    Request,
    SamplingPlan,
    end_tokens_banned,
    record,
    remove,
)
from tests.fakes.engine_requests import PLAIN, VOCAB, ignore


def request(output: tuple[int, ...] = (), **changes: Any) -> Request:
    """A request that differs from the plain one in some ways."""
    return Request(
        msgspec.structs.replace(PLAIN, **changes),
        ignore,
        output_ids=list(output),
        output_logprobs=[-1.0] * len(output),
    )


def ends(rows: list[Request], tokens: list[int]) -> list[bool]:
    """Append one token to every row with logprob -0.5; which of them end."""
    reasons = record(rows, torch.tensor(tokens), torch.full((len(tokens),), -0.5), "v")
    return [row in reasons for row in range(len(tokens))]


def test_rows_end_at_their_own_stop_ids_and_lengths() -> None:
    rows = [
        request(stop_ids=frozenset({5})),
        request(max_new_tokens=2),
        request(stop_ids=frozenset({6, 7, 8})),
        request(),
    ]
    assert ends(rows, [6, 5, 5, 5]) == [False, False, False, False]
    assert ends(rows, [5, 1, 8, 6]) == [True, True, True, False]


def test_a_logprob_that_is_not_finite_ends_a_row() -> None:
    rows = [request(), request()]
    ended = record(rows, torch.tensor([1, 1]), torch.tensor([float("nan"), -1.0]), "v")
    assert ended == {0: NOT_FINITE}


def test_each_row_keeps_its_own_output() -> None:
    first, second = rows = [request(max_new_tokens=500), request(max_new_tokens=500)]
    for step in range(150):
        ends(rows, [step % VOCAB, 3])
    assert first.output_ids == [step % VOCAB for step in range(150)]
    assert first.output_logprobs == [-0.5] * 150
    assert second.output_ids == [3] * 150


def test_the_last_rows_fill_the_gaps_and_nothing_is_mixed_up() -> None:
    rows = [request(rid=str(i), sampling_seed=i, stop_ids=frozenset({10 + i})) for i in range(5)]
    ends(rows, [0, 1, 2, 3, 4])
    assert remove(rows, [0, 3]) == ([4], [0])
    assert [r.generation.rid for r in rows] == ["4", "1", "2"]
    assert [r.output_ids for r in rows] == [[4], [1], [2]]
    assert SamplingPlan.of(rows).seeds.tolist() == [4, 1, 2]
    assert ends(rows, [14, 10, 12]) == [True, False, True]
    assert remove(rows, [0, 1, 2]) == ([], [])
    assert rows == []


def test_a_request_that_comes_back_has_its_output() -> None:
    rows = [request(output=tuple(range(70)), max_new_tokens=72)]
    assert SamplingPlan.of(rows).positions.tolist() == [73]
    assert ends(rows, [5]) == [False]
    assert ends(rows, [6]) == [True]
    assert rows[0].output_ids == [*range(70), 5, 6]


def test_end_tokens_are_banned_until_the_row_is_long_enough() -> None:
    rows = [
        request(min_new_tokens=1, stop_ids=frozenset({4, 9})),
        request(stop_ids=frozenset({4})),
        request(),
    ]
    banned = end_tokens_banned(rows, VOCAB)
    assert banned is not None
    assert banned.nonzero().tolist() == [[0, 4], [0, 9]]
    ends(rows, [1, 1, 1])
    assert end_tokens_banned(rows, VOCAB) is None


def test_the_plan_says_what_the_batch_needs() -> None:
    rows = [request()]
    plain = SamplingPlan.of(rows)
    needs = [plain.any_scaled, plain.any_greedy, plain.all_greedy, plain.any_filtered]
    assert not any(needs)
    rows += [request(temperature=0.5, top_k=1), request(top_k=3)]
    mixed = SamplingPlan.of(rows)
    assert mixed.any_scaled
    assert mixed.any_greedy
    assert mixed.any_filtered
    assert not mixed.all_greedy
    assert SamplingPlan.of(rows[1:2]).all_greedy
    assert not SamplingPlan.of(rows[:2]).any_filtered
    assert mixed.temperatures.tolist() == [1.0, 0.5, 1.0]
