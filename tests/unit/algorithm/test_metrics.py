import math

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
    to_tensors,
    values,
)


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
