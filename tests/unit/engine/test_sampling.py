"""Noise without state, and sampling that follows the distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_grpo.engine.batch import (
    SamplingPlan,
    filter_logprobs,
    mix_,
    sample,
    sample_seed,
    uniform,
)

VOCAB = 12


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
    logits = torch.linspace(-2, 2, VOCAB)
    rows = 40_000
    tokens, logprobs = sample(
        logits.expand(rows, VOCAB),
        plan(rows, temperatures=torch.full((rows,), temperature)),
    )
    expected = (logits / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=VOCAB) / rows
    assert float((counts - expected).abs().max()) < 0.01
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_greedy_rows_take_the_best_beside_rows_that_sample() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
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
    logprobs = torch.full((1, VOCAB), 1 / VOCAB).log()
    kept = filter_logprobs(logprobs, plan(1, top_k=torch.tensor([3])))
    assert int(kept.isfinite().sum()) == 3


def test_banned_tokens_are_never_sampled_and_logprobs_are_of_the_full_distribution() -> None:
    rows = 500
    logits = torch.zeros(rows, VOCAB)
    banned = torch.zeros(rows, VOCAB, dtype=torch.bool)
    banned[:, 2:] = True
    tokens, logprobs = sample(logits, plan(rows), banned)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, torch.full((rows,), 1 / VOCAB).log())


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
