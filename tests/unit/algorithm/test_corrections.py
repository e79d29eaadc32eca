from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.off_policy import train
from lightning_grpo.algorithm.corrections import (
    OPSM,
    CombinedCorrection,
    GeometricMask,
    IcePop,
    SequenceMask,
    SequenceTIS,
    TokenMask,
    TokenTIS,
)
from lightning_grpo.algorithm.metrics import values
from lightning_grpo.errors import ConfigError
from tests.fakes.micro_batches import make_micro_batch

CORRECTIONS = [
    TokenTIS(),
    SequenceTIS(),
    IcePop(),
    TokenMask(),
    SequenceMask(),
    GeometricMask(),
    OPSM(),
    CombinedCorrection((GeometricMask(), TokenTIS())),
]


def batch_with_ratios(*sequences):
    """One prompt token each, then responses whose proximal / behavior ratios are given."""
    _, batch = make_micro_batch([(1, len(ratios)) for ratios in sequences])
    log_ratio = torch.cat(
        [torch.tensor([7.0, *ratios], dtype=torch.float64).log() for ratios in sequences]
    )
    return replace(
        batch, proximal_logprobs=batch.behavior_logprobs + log_ratio, loss_mask=batch.response_mask
    )


def weights(correction, batch):
    return correction(batch.proximal_logprobs, batch)[0][batch.loss_mask].tolist()


def test_token_and_sequence_corrections_by_hand():
    batch = batch_with_ratios((4.0, 0.25, 1.5), (3.0, 2.0))
    cases = [
        (TokenTIS(2.0), [2.0, 0.25, 1.5, 2.0, 2.0]),
        (SequenceTIS(5.0), [1.5] * 3 + [5.0] * 2),
        (IcePop(0.5, 3.5), [0.0, 0.0, 1.5, 3.0, 2.0]),
        (TokenMask(0.5, 2.0), [0.0, 0.0, 1.0, 0.0, 1.0]),
        (SequenceMask(0.5, 2.0), [1.0] * 3 + [0.0] * 2),
        # 1.5^(1/3) = 1.145, 6^(1/2) = 2.449
        (GeometricMask(0.9, 1.2), [1.0] * 3 + [0.0] * 2),
        (CombinedCorrection((GeometricMask(0.9, 1.2), TokenTIS(2.0))), [2.0, 0.25, 1.5, 0.0, 0.0]),
    ]
    for correction, expected in cases:
        assert weights(correction, batch) == pytest.approx(expected), correction


def test_opsm_drops_bad_sequences_alone_and_only_where_the_policy_left_them():
    batch = batch_with_ratios((0.5, 0.5), (0.5, 0.5), (0.9, 0.9))
    negative = replace(batch, advantages=-torch.ones(9, dtype=torch.float64))
    mixed = replace(negative, advantages=torch.where(torch.arange(9) < 3, 1.0, -1.0).double())
    # mean log(behavior / policy) = log 2 = 0.69 and 0.105
    assert weights(OPSM(0.5), negative) == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert weights(OPSM(0.5), mixed) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def test_opsm_looks_at_the_policy_being_trained_where_the_batch_carries_it():
    batch = batch_with_ratios((0.5, 0.5))
    batch = replace(batch, advantages=-torch.ones(3, dtype=torch.float64))
    assert weights(OPSM(0.5), batch) == [0.0, 0.0]
    assert weights(OPSM(0.5), replace(batch, policy_logprobs=batch.behavior_logprobs)) == [1.0, 1.0]


def test_the_metrics_name_the_mean_weight_and_the_fractions_dropped_and_capped():
    batch = batch_with_ratios((4.0, 0.25, 1.5), (3.0, 2.0))
    _, metrics = TokenTIS(2.0)(batch.proximal_logprobs, batch)
    assert values(metrics) == pytest.approx(
        {
            "correction/weight_mean": 7.75 / 5,
            "correction/dropped_fraction": 0.0,
            "correction/capped_fraction": 2 / 5,
        }
    )
    _, metrics = IcePop(0.5, 3.5)(batch.proximal_logprobs, batch)
    assert values(metrics)["correction/dropped_fraction"] == pytest.approx(2 / 5)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=repr)
def test_equal_policies_need_no_correction(correction):
    _, batch = make_micro_batch([(2, 5), (1, 3)])
    found, metrics = correction(batch.behavior_logprobs, batch)
    assert (found == 1).all()
    assert values(metrics)["correction/weight_mean"] == 1.0


@pytest.mark.parametrize("correction", CORRECTIONS, ids=repr)
def test_weights_carry_no_gradient_and_ignore_what_is_outside_the_mask(correction):
    _, batch = make_micro_batch([(2, 5), (1, 3)], seed=2)
    proximal = batch.proximal_logprobs.requires_grad_()
    found, _ = correction(proximal, batch)
    assert not found.requires_grad
    spoiled = torch.where(batch.loss_mask, proximal, float("nan"))
    assert torch.equal(correction(spoiled, batch)[0][batch.loss_mask], found[batch.loss_mask])


@settings(deadline=None)
@given(seed=st.integers(0, 1000), cap=st.floats(1.0, 5.0), spread=st.floats(0.0, 30.0))
def test_weights_are_finite_and_within_their_bounds(seed, cap, spread):
    _, batch = make_micro_batch([(1, 6), (2, 4)], seed=seed, spread=spread)
    for correction in (TokenTIS(cap), SequenceTIS(cap)):
        found, _ = correction(batch.proximal_logprobs, batch)
        assert ((found > 0) & (found <= cap)).all()
    found, _ = IcePop(0.5, cap)(batch.proximal_logprobs, batch)
    assert ((found == 0) | ((found >= 0.5) & (found <= cap))).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TokenTIS(0.5), "cap"),
        (lambda: SequenceTIS(0.9), "cap"),
        (lambda: IcePop(1.5, 2.0), "low"),
        (lambda: GeometricMask(0.9, 0.99), "low"),
        (lambda: OPSM(-0.1), "delta"),
    ],
)
def test_settings_that_drop_unchanged_weights_are_refused(make, name):
    with pytest.raises(ConfigError, match=f"`{name}`.* must .* got .*Way out"):
        make()


# ---- a run that fails without a correction, and learns with one ---------------------------------

START = 0.5


def test_servers_that_sample_a_good_token_too_rarely_make_the_policy_unlearn_it():
    assert train(None, seed=0, steps=100) < START - 0.01


@pytest.mark.parametrize("correction", [TokenTIS(), SequenceTIS(), IcePop(0.5, 10.0)], ids=str)
def test_a_correction_saves_the_run(correction):
    assert train(correction, seed=0, steps=100) > START + 0.08


def test_servers_that_agree_need_none():
    assert train(None, seed=0, steps=100, bias=0.0) > START + 0.15
