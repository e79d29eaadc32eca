"""Rows of the running batch: they end, close their gaps, and say what the sampler needs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from msgspec import structs

from lightning_grpo.engine.batch import (
    NOT_FINITE,
    Output,
    Request,
    SamplingPlan,
    end_tokens_banned,
    filter_logprobs,
    find_stop,
    mix_,
    record,
    remove,
    sample,
    sample_seed,
    uniform,
)
from lightning_grpo.engine.http import reply_text
from tests.fakes.engine_requests import PLAIN, VOCAB, ignore
from tests.fakes.tiny_model import make_tiny_tokenizer


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


def test_an_end_token_at_the_limit_counts_before_the_limit() -> None:
    rows = [request(max_new_tokens=1, stop_ids=frozenset({5})) for _ in range(2)]
    ended = record(rows, torch.tensor([5, 6]), torch.tensor([-1.0, -1.0]), "v")
    assert ended == {0: {"type": "stop", "matched": 5}, 1: {"type": "length", "length": 1}}


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


# ---- stop strings that are spelled by any tokens ------------------------------------------------


@pytest.mark.parametrize("stop", ["apples", "\n####", "s.\n", "<|im_end|>", "\u2603"])
def test_a_stop_string_is_found_whatever_tokens_spell_it(stop: str) -> None:
    tokenizer = make_tiny_tokenizer()
    text = f"Tom has many things {stop}"
    whole = tokenizer(text)["input_ids"]
    # Byte by byte, as a random model may write it.
    bytewise = [i for character in text for i in tokenizer(character)["input_ids"]]
    for ids in (whole, bytewise):
        found = [k for k in range(1, len(ids) + 1) if find_stop(tokenizer, [stop], ids[:k])]
        assert found[:1] == [len(ids)]
        # What came long ago is not looked through again.
        assert find_stop(tokenizer, [stop], ids * 2 + whole[:1] * 100) is None


def test_the_first_listed_string_is_named_and_none_is_none() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("one two")["input_ids"]
    assert find_stop(tokenizer, ["two", "one"], ids) == "two"
    assert find_stop(tokenizer, ["three"], ids) is None


def said(text: str, matched: str | int | None, **asked: Any) -> str:
    """The reply's text of a completion that spells `text`."""
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    request = Request(structs.replace(PLAIN, **asked), ignore, output_ids=ids)
    return reply_text(Output(request, len(ids), {"matched": matched}, "default"), tokenizer)


def test_text_is_cut_at_its_string_and_not_at_a_token() -> None:
    assert said("a STOP b STOP", "STOP") == "a "
    assert said("a STOP b STOP", "STOP", no_stop_trim=True) == "a STOP b STOP"
    assert said("a 2 b.", 2) == "a 2 b"
    assert said("a", None) == "a"


def test_decoding_can_leave_special_tokens_out() -> None:
    assert said("hi<|im_end|>", None) == "hi"
    assert said("hi<|im_end|>", None, skip_special_tokens=False) == "hi<|im_end|>"


# ---- noise without state, and sampling that follows the distribution ----------------------------

SMALL_VOCAB = 12


def plan(rows: int, **changes: object) -> SamplingPlan:
    """Plain sampling of `rows` requests with seeds 0, 1, ... at position 3."""
    return replace(
        SamplingPlan(
            temperatures=torch.ones(rows),
            top_p=torch.ones(rows),
            top_k=torch.full((rows,), 1 << 31),
            min_p=torch.zeros(rows),
            seeds=torch.arange(rows),
            positions=torch.full((rows,), 3),
        ),
        **changes,
    )


def splitmix(value: int) -> int:
    """The finalizer as it is published, in Python's numbers."""
    mask = (1 << 64) - 1
    value &= mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return sample_seed(value ^ (value >> 31), 0)


def test_the_hash_of_a_tensor_is_that_of_its_numbers() -> None:
    numbers = [0, 1, 2**63 - 1, -1, -(2**63), 0x123456789ABCDEF]
    assert mix_(torch.tensor(numbers)).tolist() == [splitmix(n) for n in numbers]


def test_seeds_wrap_at_64_bits_and_samples_get_their_own() -> None:
    assert sample_seed(2**64 + 5, 0) == 5
    assert sample_seed(2**63, 0) == -(2**63)
    assert sample_seed(7, 0) == 7
    seeds = {sample_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 50 * 50


def test_numbers_are_uniform_over_seeds_and_positions() -> None:
    steps = torch.arange(200_000)
    for values in (
        uniform(steps, torch.full_like(steps, 9)),
        uniform(torch.full_like(steps, 9), steps),
    ):
        assert bool(((values > 0) & (values < 1)).all())
        assert float(values.mean()) == pytest.approx(1 / 2, abs=0.002)
        assert float(values.var()) == pytest.approx(1 / 12, abs=0.001)
        # Neighbors know nothing of each other.
        assert float((values[1:] * values[:-1]).mean()) == pytest.approx(1 / 4, abs=0.002)


def test_the_number_of_a_row_does_not_depend_on_the_others() -> None:
    seeds, positions = torch.tensor([5, -9, 2**62]), torch.tensor([1, 7, 7])
    together = uniform(seeds, positions)
    for row in range(3):
        assert torch.equal(together[row : row + 1], uniform(seeds[row], positions[row])[None])


def test_numbers_change_with_seed_and_position() -> None:
    pairs = [(1, 2), (2, 2), (1, 3), (2, 1)]  # seed and position are not merely added up
    assert len({float(uniform(torch.tensor(s), torch.tensor(p))) for s, p in pairs}) == 4


def test_every_token_of_a_large_vocabulary_is_sampled_as_often_as_it_is_likely() -> None:
    vocab, rows = 50_000, 100
    # Each of the last half a tenth as likely as one of the first half, whose ten bins make 10/11.
    logits = torch.zeros(vocab)
    logits[vocab // 2 :] = math.log(1e-1)
    drawn = torch.cat(
        [
            sample(logits.expand(rows, vocab), plan(rows, seeds=torch.arange(rows) + rows * k))[0]
            for k in range(20)
        ]
    )
    assert float((drawn >= vocab // 2).double().mean()) == pytest.approx(1 / 11, abs=0.03)
    counts = torch.bincount(drawn[drawn < vocab // 2] // (vocab // 20), minlength=10)
    assert bool(((counts / len(drawn) - 1 / 11).abs() < 0.03).all())
    last = torch.zeros(1, vocab, dtype=torch.bool)
    last[:, :-1] = True
    assert int(sample(logits[None], plan(1), last)[0]) == vocab - 1


def test_logits_that_are_not_finite_have_no_finite_logprob() -> None:
    for bad in (float("nan"), float("inf")):
        tokens, logprobs = sample(torch.tensor([[0.0, bad, 1.0]]), plan(1))
        assert 0 <= int(tokens) < 3
        assert not bool(logprobs.isfinite())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_temperature_scaled_distribution(temperature: float) -> None:
    logits = torch.linspace(-2, 2, SMALL_VOCAB)
    rows = 40_000
    tokens, logprobs = sample(
        logits.expand(rows, SMALL_VOCAB),
        plan(rows, temperatures=torch.full((rows,), temperature)),
    )
    expected = (logits / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=SMALL_VOCAB) / rows
    assert float((counts - expected).abs().max()) < 0.01
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_greedy_rows_take_the_best_beside_rows_that_sample() -> None:
    logits = torch.randn(6, SMALL_VOCAB, generator=torch.Generator().manual_seed(0))
    greedy = torch.tensor([True, False] * 3)
    top_k = torch.where(greedy, 1, 1 << 31)
    tokens, _ = sample(logits, plan(6, top_k=top_k))
    sampled, _ = sample(logits, plan(6))
    assert torch.equal(tokens[greedy], logits.argmax(-1)[greedy])
    assert torch.equal(tokens[~greedy], sampled[~greedy])


def test_filters_keep_what_they_say() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logprobs = probabilities.log().expand(5, 4)
    kept = filter_logprobs(
        logprobs,
        plan(
            5,
            top_p=torch.tensor([1.0, 0.65, 1.0, 1.0, 0.01]),
            top_k=torch.tensor([4, 4, 3, 4, 4]),
            min_p=torch.tensor([0.0, 0.0, 0.0, 0.6, 0.0]),
        ),
    ).isfinite()
    assert kept.tolist() == [
        [True, True, True, True],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, False, False],
        [True, False, False, False],
    ]


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    logprobs = torch.full((1, SMALL_VOCAB), 1 / SMALL_VOCAB).log()
    kept = filter_logprobs(logprobs, plan(1, top_k=torch.tensor([3])))
    assert int(kept.isfinite().sum()) == 3


def test_banned_tokens_are_never_sampled_and_logprobs_are_of_the_full_distribution() -> None:
    rows = 500
    logits = torch.zeros(rows, SMALL_VOCAB)
    banned = torch.zeros(rows, SMALL_VOCAB, dtype=torch.bool)
    banned[:, 2:] = True
    tokens, logprobs = sample(logits, plan(rows), banned)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, torch.full((rows,), 1 / SMALL_VOCAB).log())


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 1}, {"min_p": 0.5}])
def test_where_filters_would_leave_banned_tokens_alone_they_choose_among_the_others(
    filters: dict[str, float],
) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 20.0]).expand(200, 5)
    banned = torch.tensor([False] * 4 + [True]).expand(200, 5)
    ((name, value),) = filters.items()
    wanted = plan(200, **{name: torch.full((200,), value)})
    tokens, logprobs = sample(logits, wanted, banned)
    # softmax of 0 to 3: 0.03, 0.09, 0.24, 0.64
    kept = {"top_p": {1, 2, 3}, "top_k": {3}, "min_p": {3}}[name]
    assert set(tokens.tolist()) == kept
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens])


def test_a_row_without_filters_keeps_every_token_beside_one_that_has_them() -> None:
    logits = torch.tensor([[0.0, -20.0, -30.0]]).expand(2, 3)
    kept = filter_logprobs(logits.log_softmax(-1), plan(2, top_p=torch.tensor([1.0, 0.5])))
    assert kept.isfinite().tolist() == [[True] * 3, [True, False, False]]
