import math
from dataclasses import replace
from math import exp

import pytest
import torch

from lightning_grpo.algorithm.metrics import (
    EffectiveFraction,
    Max,
    Mean,
    Sum,
    from_tensors,
    masked_max,
    masked_mean,
    merge,
    mismatch_metrics,
    to_tensors,
    values,
    zero_variance_fraction,
)
from tests.fakes.micro_batches import make_micro_batch, select_sequences


def test_merging_weights_a_mean_by_its_tokens_and_keeps_the_largest_maximum():
    first = {"m": Mean(torch.tensor(6.0), torch.tensor(2)), "s": Sum(1), "x": Max(3.0)}
    second = {"m": Mean(4.0, 8), "s": Sum(torch.tensor(2.0)), "x": Max(torch.tensor(2.0))}
    assert values(merge(first, second)) == {"m": 1.0, "s": 3.0, "x": 3.0}


def test_a_name_in_one_dictionary_only_is_kept_and_neither_input_changes():
    first, second = {"a": Sum(1.0)}, {"b": Sum(2.0)}
    assert values(merge(first, second)) == {"a": 1.0, "b": 2.0}
    assert list(first) == ["a"]


def test_one_name_for_two_kinds_is_refused():
    with pytest.raises(TypeError, match="`a` must be of one kind, got Sum and Max"):
        merge({"a": Sum(1.0)}, {"a": Max(1.0)})


def test_summing_and_maximizing_the_tensors_over_ranks_equals_merging():
    ranks = [
        {
            "b/mean": Mean(torch.tensor(float(r)), torch.tensor(r)),
            "a/max": Max(float(-r)),
            "c/ess": EffectiveFraction(r, r * r, 1),
            "d": Sum(r),
        }
        for r in (1, 2, 5)
    ]
    tensors = [to_tensors(m) for m in ranks]
    sums = torch.stack([s for s, _ in tensors]).sum(0)
    maxima = torch.stack([m for _, m in tensors]).amax(0)
    assert values(from_tensors(ranks[0], sums, maxima)) == values(
        merge(merge(ranks[0], ranks[1]), ranks[2])
    )


def test_metrics_without_a_maximum_give_an_empty_vector_that_can_still_be_reduced():
    sums, maxima = to_tensors({"a": Sum(2.0)})
    assert maxima.shape == (0,)
    assert values(from_tensors({"a": Sum(0.0)}, sums, maxima)) == {"a": 2.0}


def test_a_mean_or_maximum_over_nothing_is_not_logged():
    nothing = torch.zeros(3, dtype=torch.bool)
    metrics = {
        "mean": masked_mean(torch.ones(3), nothing),
        "max": masked_max(torch.ones(3), nothing),
        "ess": EffectiveFraction(0.0, 0.0, 0),
        "sum": Sum(0.0),
    }
    assert values(metrics) == {"sum": 0.0}
    assert math.isnan(metrics["mean"].value())


def test_masked_metrics_do_not_see_what_is_outside_the_mask():
    mask = torch.tensor([True, False, True])
    tokens = torch.tensor([1.0, math.nan, 3.0])
    assert masked_mean(tokens, mask).value() == 2.0
    assert masked_max(tokens, mask).value() == 3.0


def test_the_effective_fraction_is_one_for_equal_weights_and_one_nth_for_a_single_one():
    equal, single = torch.full((4,), 0.3), torch.tensor([0.0, 0.0, 2.0, 0.0])
    fractions = [
        EffectiveFraction(w.sum(), w.square().sum(), len(w)).value() for w in (equal, single)
    ]
    assert fractions == pytest.approx([1.0, 0.25])


# ---- mismatch -----------------------------------------------------------------------------------


def test_tokens_of_the_current_version_and_older_ones_are_never_mixed():
    policy, batch = make_micro_batch([(1, 4)])
    difference = torch.tensor([9.0, 0.1, -0.1, 0.5, -0.5], dtype=torch.float64)
    batch = replace(
        batch,
        loss_mask=batch.response_mask,
        behavior_logprobs=policy.detach() - difference,
        weight_versions=torch.tensor([-1, 7, 7, 6, 5]),
    )
    found = values(mismatch_metrics(policy, batch, version=7))

    def k3(d):
        return exp(d) - d - 1

    older = [exp(0.5), exp(-0.5)]
    assert found == pytest.approx(
        {
            "mismatch/abs_logprob_diff": 0.1,
            "mismatch/k3": (k3(0.1) + k3(-0.1)) / 2,
            "offpolicy/abs_logprob_diff": 0.5,
            "offpolicy/k3": (k3(0.5) + k3(-0.5)) / 2,
            "offpolicy/ess": sum(older) ** 2 / (2 * sum(w * w for w in older)),
        }
    )


def test_a_batch_of_one_version_logs_nothing_about_others():
    policy, batch = make_micro_batch([(1, 4)])
    batch = replace(batch, weight_versions=torch.full((5,), 3))
    assert set(values(mismatch_metrics(policy, batch, 3))) == {
        "mismatch/abs_logprob_diff",
        "mismatch/k3",
    }
    assert set(values(mismatch_metrics(policy, batch, 4))) == {
        "offpolicy/abs_logprob_diff",
        "offpolicy/k3",
        "offpolicy/ess",
    }


def test_micro_batches_merge_to_the_same_numbers():
    policy, batch = make_micro_batch([(1, 4), (2, 7), (1, 5)], seed=3)
    merged = {}
    for rows in ([0, 2], [1]):
        tokens, part = select_sequences(batch, rows)
        merged = merge(merged, mismatch_metrics(policy[tokens], part, 4))
    assert values(merged) == pytest.approx(values(mismatch_metrics(policy, batch, 4)))


# ---- rollout metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 6, 7, 8])
@pytest.mark.parametrize("reward", [0.0, 0.3, 0.7, 123.4, -1e-4])
def test_equal_rewards_have_no_variance_whatever_their_mean_rounds_to(reward, size):
    rewards = torch.tensor([reward] * size + [reward] * (size - 1) + [reward + 0.1])
    group_ids = torch.tensor([0] * size + [1] * size)
    assert zero_variance_fraction(rewards, group_ids).item() == 0.5
