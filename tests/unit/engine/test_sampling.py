"""Noise without state, and sampling that follows the distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_grpo.engine.sampling import (
    Noise,
    SamplingPlan,
    as_int64,
    filter_logprobs,
    mix,
    mix_,
    sample,
    sample_seed,
)

VOCAB = 12


def plan(rows: int, **changes: object) -> SamplingPlan:
    """Plain sampling of `rows` requests with seeds 0, 1, ... at position 3."""
    return replace(
        SamplingPlan(
            temperatures=torch.ones(rows),
            greedy=torch.zeros(rows, dtype=torch.bool),
            top_p=torch.ones(rows),
            top_k=torch.full((rows,), VOCAB),
            min_p=torch.zeros(rows),
            seeds=torch.arange(rows),
            positions=torch.full((rows,), 3),
            any_scaled=False,
            any_greedy=False,
            all_greedy=False,
            any_filtered=False,
        ),
        **changes,
    )


def test_the_hash_of_a_tensor_is_that_of_its_numbers() -> None:
    numbers = [0, 1, 2**63 - 1, -1, -(2**63), 0x123456789ABCDEF]
    assert mix_(torch.tensor(numbers)).tolist() == [mix(n) for n in numbers]


def test_seeds_wrap_at_64_bits_and_samples_get_their_own() -> None:
    assert as_int64(2**64 + 5) == 5
    assert as_int64(2**63) == -(2**63)
    assert sample_seed(7, 0) == 7
    seeds = {sample_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 50 * 50


def test_noise_is_exponential_over_tokens_seeds_and_positions() -> None:
    noise = Noise(64)
    steps = torch.arange(4000)
    for values in (
        noise.exponential(steps, torch.full_like(steps, 9)),
        noise.exponential(torch.full_like(steps, 9), steps),
    ):
        assert bool((values > 0).all())
        assert bool(values.isfinite().all())
        assert float(values.mean()) == pytest.approx(1, abs=0.01)
        assert float(values.var()) == pytest.approx(1, abs=0.03)
        # Neighbors in either direction know nothing of each other.
        assert float((values[:, 1:] * values[:, :-1]).mean()) == pytest.approx(1, abs=0.02)
        assert float((values[1:] * values[:-1]).mean()) == pytest.approx(1, abs=0.02)


def test_noise_of_a_row_does_not_depend_on_the_others() -> None:
    noise = Noise(VOCAB)
    seeds, positions = torch.tensor([5, -9, 2**62]), torch.tensor([1, 7, 7])
    together = noise.exponential(seeds, positions)
    for row in range(3):
        alone = noise.exponential(seeds[row : row + 1], positions[row : row + 1])
        assert torch.equal(together[row], alone[0])


def test_noise_changes_with_seed_position_and_token() -> None:
    noise = Noise(VOCAB)
    base = noise.exponential(torch.tensor([1]), torch.tensor([2]))
    assert not torch.equal(base, noise.exponential(torch.tensor([2]), torch.tensor([2])))
    assert not torch.equal(base, noise.exponential(torch.tensor([1]), torch.tensor([3])))
    # Seed and position are not merely added up.
    assert not torch.equal(base, noise.exponential(torch.tensor([2]), torch.tensor([1])))
    assert len(set(base[0].tolist())) == VOCAB


def test_no_two_tokens_of_a_large_vocabulary_share_their_noise_for_ever() -> None:
    several = torch.arange(3)
    noise = Noise(200_000).exponential(several, several)
    assert len(set(zip(*noise.tolist(), strict=True))) == 200_000


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_temperature_scaled_distribution(temperature: float) -> None:
    logits = torch.linspace(-2, 2, VOCAB)
    rows = 40_000
    tokens, logprobs = sample(
        logits.expand(rows, VOCAB),
        plan(rows, temperatures=torch.full((rows,), temperature), any_scaled=True),
        Noise(VOCAB),
    )
    expected = (logits / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=VOCAB) / rows
    assert float((counts - expected).abs().max()) < 0.01
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_greedy_rows_take_the_best_beside_rows_that_sample() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    greedy = torch.tensor([True, False] * 3)
    tokens, _ = sample(logits, plan(6, greedy=greedy, any_greedy=True), Noise(VOCAB))
    sampled, _ = sample(logits, plan(6), Noise(VOCAB))
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
    tokens, logprobs = sample(logits, plan(rows), Noise(VOCAB), banned)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, torch.full((rows,), 1 / VOCAB).log())


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 1}, {"min_p": 0.5}])
def test_where_filters_would_leave_banned_tokens_alone_they_choose_among_the_others(
    filters: dict[str, float],
) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 20.0]).expand(200, 5)
    banned = torch.tensor([False] * 4 + [True]).expand(200, 5)
    ((name, value),) = filters.items()
    wanted = plan(200, any_filtered=True, **{name: torch.full((200,), value)})
    tokens, logprobs = sample(logits, wanted, Noise(5), banned)
    # softmax of 0 to 3: 0.03, 0.09, 0.24, 0.64
    kept = {"top_p": {1, 2, 3}, "top_k": {3}, "min_p": {3}}[name]
    assert set(tokens.tolist()) == kept
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens])


def test_a_row_without_filters_keeps_every_token_beside_one_that_has_them() -> None:
    logits = torch.tensor([[0.0, -20.0, -30.0]]).expand(2, 3)
    kept = filter_logprobs(logits.log_softmax(-1), plan(2, top_p=torch.tensor([1.0, 0.5])))
    assert kept.isfinite().tolist() == [[True] * 3, [True, False, False]]
