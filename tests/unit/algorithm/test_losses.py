""""""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.algorithm.batch import Denominators, expand, sequence_mean
from lightning_grpo.algorithm.corrections import IcePop, SequenceTIS, TokenTIS
from lightning_grpo.algorithm.losses import (
    K1,
    K2,
    K3,
    CappedCISPOLoss,
    CISPOLoss,
    ConstantLength,
    DPPOLoss,
    GRPOLoss,
    GSPOLoss,
    KLPenalty,
    M2POLoss,
    SAPOLoss,
    SequenceMean,
    TokenMean,
    WeightedK3,
    clipped_surrogate,
    dual_clip_bound,
    second_moment_keep,
    soft_gate,
    total_variation_keep,
    weighted_log_likelihood,
)
from lightning_grpo.algorithm.metrics import merge, values
from lightning_grpo.errors import ConfigError
from lightning_grpo.objective import minibatch_loss
from tests.fakes.micro_batches import PER_TOKEN, make_micro_batch, select_sequences
from tests.fakes.trl_oracle import CASES, GOLDEN, grad_norm, ours, trls

LOSSES = [
    GRPOLoss(),
    GRPOLoss(dual_clip=3.0),
    GSPOLoss(),
    CISPOLoss(),
    CappedCISPOLoss(),
    SAPOLoss(),
    DPPOLoss(),
    M2POLoss(),
]
LENGTHS = [(2, 5), (3, 1), (1, 8), (4, 3)]


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_clipped_surrogate_by_hand():
    log_ratio = tensor(1.5, 1.5, 0.5, 0.5, 1.1).log()
    advantages = tensor(2.0, -2.0, 2.0, -2.0, 1.0)
    # clip to [0.8, 1.28]: A > 0 is bounded above, A < 0 below
    assert clipped_surrogate(log_ratio, advantages, 0.2, 0.28).tolist() == pytest.approx(
        [-2.56, 3.0, -1.0, 1.6, -1.1]
    )


def test_the_dual_clip_bounds_negative_advantages_alone():
    loss = tensor(10.0, 2.0, -1.0)
    assert dual_clip_bound(loss, tensor(-1.0, -1.0, 1.0), 3.0).tolist() == [3.0, 2.0, -1.0]


def test_cispo_weights_the_log_likelihood_by_hand():
    loss = weighted_log_likelihood(tensor(-0.5, -2.0), tensor(2.0, -1.0), tensor(1.5, 0.5))
    assert loss.tolist() == [1.5, -1.0]


def test_the_soft_gate_by_hand_and_its_slope_is_minus_the_advantage_at_ratio_one():
    log_ratio = tensor(0.0, log(2.0), log(2.0)).requires_grad_()
    advantages = tensor(3.0, 1.0, -1.0)
    loss = soft_gate(log_ratio, advantages, 1.0, 2.0)
    assert loss.tolist() == pytest.approx([-6.0, -4 / (1 + exp(-1)), 2 / (1 + exp(-2))])
    loss[0].backward()
    assert log_ratio.grad[0].item() == pytest.approx(-3.0)


def test_total_variation_drops_only_moves_that_the_advantage_still_pushes():
    policy, anchor = tensor(0.8, 0.8, 0.3, 0.3, 0.6).log(), tensor(0.5).log()
    advantages = tensor(1.0, -1.0, 1.0, -1.0, 1.0)
    keep = total_variation_keep(policy, anchor, advantages, 0.1, 0.2)
    assert keep.tolist() == [False, True, True, False, True]


def test_the_second_moment_is_met_by_dropping_the_largest_alone():
    log_ratio = tensor(0.1, -1.0, 0.3, 9.0, -0.2)
    mask = torch.tensor([True, True, True, False, True])
    # squares of the masked: .01 1 .09 .04; means of the smallest 1..4: .01 .025 .0467 .285
    assert second_moment_keep(log_ratio, mask, 0.04).tolist() == [True, False, False, True, True]
    assert second_moment_keep(log_ratio, mask, 0.05).tolist() == [True, False, True, True, True]
    assert second_moment_keep(log_ratio, torch.zeros_like(mask), 0.05).all()


def test_gspo_in_token_form_has_the_gradient_of_the_sequence_form():
    policy, batch = make_micro_batch(LENGTHS, seed=3, spread=0.002)
    batch = replace(batch, loss_mask=batch.response_mask)
    loss, _ = GSPOLoss()(policy, batch)
    (SequenceMean().weights(batch) * loss).sum().backward()

    other = policy.detach().clone().requires_grad_()
    mean = sequence_mean(other - batch.proximal_logprobs, batch.loss_mask, batch.cu_seqlens)
    ratio, advantages = mean.exp(), batch.advantages[batch.cu_seqlens[:-1]]
    clipped = ratio.clamp(1 - 3e-4, 1 + 4e-4)
    sequence_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    sequence_loss.mean().backward()
    assert (ratio != clipped).any()
    assert (ratio == clipped).any()
    assert torch.allclose(policy.grad, other.grad, atol=1e-14)
    in_loss = torch.where(batch.loss_mask, loss, 0.0)
    assert torch.allclose(
        (SequenceMean().weights(batch) * in_loss).sum(), sequence_loss.mean(), atol=1e-14
    )


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_on_policy_every_gradient_is_the_plain_policy_gradient(loss):
    policy, batch = make_micro_batch(LENGTHS, seed=1)
    batch = replace(batch, proximal_logprobs=None)
    token_loss, metrics = loss(policy, batch)
    weights = loss.aggregation.weights(batch)
    (weights * token_loss).sum().backward()
    assert torch.allclose(policy.grad, -weights * batch.advantages, atol=1e-14)
    assert values(metrics)["ratio/mean"] == 1.0
    assert values(metrics)["ratio/max"] == 1.0
    assert values(metrics)["ratio/clip_fraction_low"] == 0.0
    assert values(metrics)["ratio/clip_fraction_high"] == 0.0


@pytest.mark.parametrize(
    "loss",
    [GRPOLoss(), GRPOLoss(dual_clip=1.2), SAPOLoss(), DPPOLoss(0.1, 0.1), M2POLoss()],
    ids=repr,
)
def test_the_gradient_is_that_of_finite_differences(loss):
    policy, batch = make_micro_batch([(1, 4), (2, 3)], seed=5)

    def total(logprobs):
        return (loss.aggregation.weights(batch) * loss(logprobs, batch)[0]).sum()

    total(policy).backward()
    for t in range(len(policy)):
        step = torch.zeros_like(policy)
        step[t] = 1e-6
        with torch.no_grad():
            slope = (total(policy + step) - total(policy - step)) / 2e-6
        assert policy.grad[t].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("loss", [CISPOLoss(), CappedCISPOLoss(cap=1.2)], ids=repr)
def test_cispo_keeps_the_gradient_of_every_token_at_its_clipped_weight(loss):
    policy, batch = make_micro_batch(LENGTHS, seed=2)
    high = 1.28 if isinstance(loss, CISPOLoss) else 1.2
    token_loss, metrics = loss(policy, batch)
    token_loss.sum().backward()
    ratio = (policy.detach() - batch.proximal_logprobs).exp()
    expected = torch.where(batch.loss_mask, -ratio.clamp(max=high) * batch.advantages, 0.0)
    assert torch.allclose(policy.grad, expected, atol=1e-14)
    above = (ratio > high)[batch.loss_mask].double().mean().item()
    assert above > 0
    assert values(metrics)["ratio/clip_fraction_high"] == pytest.approx(above)


def test_clip_fractions_count_the_tokens_whose_gradient_the_clip_took():
    policy, batch = make_micro_batch([(1, 20)] * 6, seed=4)
    loss, metrics = GRPOLoss(0.2, 0.28)(policy, batch)
    loss[batch.loss_mask].sum().backward()
    fractions = values(metrics)
    without = (policy.grad == 0)[batch.loss_mask].double().mean().item()
    assert fractions["ratio/clip_fraction_low"] > 0
    assert fractions["ratio/clip_fraction_high"] > 0
    assert fractions["ratio/clip_fraction_low"] + fractions[
        "ratio/clip_fraction_high"
    ] == pytest.approx(without)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_what_is_outside_the_loss_mask_reaches_neither_loss_nor_gradient(loss):
    policy, batch = make_micro_batch(LENGTHS, seed=6)
    mask = batch.loss_mask

    def run(poison):
        spoiled = torch.where(mask, policy.detach(), poison).requires_grad_()
        batch_ = replace(
            batch,
            proximal_logprobs=torch.where(mask, batch.proximal_logprobs, -poison),
        )
        token_loss, metrics = loss(spoiled, batch_)
        total = torch.where(mask, token_loss * loss.aggregation.weights(batch), 0.0).sum()
        total.backward()
        return total.detach(), spoiled.grad, values(metrics)

    total, grad, metrics = run(-1.0)
    for poison in (float("nan"), float("-inf")):
        spoiled_total, spoiled_grad, spoiled_metrics = run(poison)
        assert torch.equal(total, spoiled_total)
        assert torch.equal(grad[mask], spoiled_grad[mask])
        assert (spoiled_grad[~mask] == 0).all()
        assert metrics == spoiled_metrics


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_log_ratio_beyond_all_bounds_stays_finite(loss):
    policy, batch = make_micro_batch(LENGTHS)
    batch = replace(batch, proximal_logprobs=batch.proximal_logprobs - 1e4)
    assert loss(policy, batch)[0][batch.loss_mask].isfinite().all()


def test_each_loss_comes_with_the_aggregation_it_is_defined_with():
    sequence = {type(loss) for loss in LOSSES if loss.aggregation == SequenceMean()}
    assert sequence == {GSPOLoss, SAPOLoss}
    assert all(loss.aggregation == TokenMean() for loss in LOSSES if type(loss) not in sequence)


def test_expand_is_the_inverse_of_taking_first_tokens():
    cu_seqlens = torch.tensor([0, 3, 3, 5])
    assert expand(tensor(1.0, 2.0, 3.0), cu_seqlens).tolist() == [1.0, 1.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GRPOLoss(clip_low=1.5), "clip_low"),
        (lambda: GRPOLoss(clip_high=-0.1), "clip_high"),
        (lambda: GRPOLoss(dual_clip=1.0), "dual_clip"),
        (lambda: GSPOLoss(clip_low=-1), "clip_low"),
        (lambda: GSPOLoss(clip_low=0.2, clip_high=0.28), "clip_high"),
        (lambda: CappedCISPOLoss(cap=0.28), "cap"),
        (lambda: SAPOLoss(tau_positive=0), "tau_positive"),
        (lambda: DPPOLoss(low=0), "low"),
        (lambda: M2POLoss(threshold=0), "threshold"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, name):
    with pytest.raises(ConfigError, match=f"`{name}`.* must be .* got .*Way out"):
        make()


# ---- minibatch loss -----------------------------------------------------------------------------

# M2POLoss ranks tokens within the micro-batch and says so: it is not invariant to a split.
OBJECTIVES = st.fixed_dictionaries(
    {
        "loss": st.sampled_from(
            [GRPOLoss(), GRPOLoss(dual_clip=1.5), GSPOLoss(), CISPOLoss(), SAPOLoss(), DPPOLoss()]
        ),
        "aggregation": st.sampled_from([TokenMean(), SequenceMean(), ConstantLength(7)]),
        "correction": st.sampled_from([None, TokenTIS(), SequenceTIS(), IcePop()]),
        "kl": st.sampled_from([None, KLPenalty(0.1)]),
    }
)
LENGTH_LISTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=2, max_size=6)
TOLERANCE = [(torch.float64, 1e-12), (torch.float32, 1e-6)]


def whole(policy, batch, objective):
    policy = policy.detach().clone().requires_grad_()
    total, metrics = minibatch_loss(policy, batch, **objective)
    total.backward()
    return total.detach(), policy.grad, values(metrics)


def in_parts(policy, batch, objective, parts):
    total, grad, merged = 0.0, torch.zeros_like(policy), {}
    for rows in parts:
        tokens, part = select_sequences(batch, rows)
        part_policy = policy.detach()[tokens].requires_grad_()
        part_total, metrics = minibatch_loss(part_policy, part, **objective)
        part_total.backward()
        total, merged = total + part_total.detach(), merge(merged, metrics)
        grad[tokens] = part_policy.grad
    return total, grad, values(merged)


def assert_same(found, expected, tolerance):
    # Relative to the size of what is compared, once that exceeds 1.
    for left, right in zip(found[:2], expected[:2], strict=True):
        scale = max(1.0, right.norm().item())
        assert (left - right).norm().item() <= tolerance * scale
    assert found[2] == pytest.approx(expected[2], rel=100 * tolerance, abs=100 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@settings(deadline=None, max_examples=60)
@given(lengths=LENGTH_LISTS, seed=st.integers(0, 999), objective=OBJECTIVES, data=st.data())
def test_order_and_split_into_micro_batches_change_nothing(
    dtype, tolerance, lengths, seed, objective, data
):
    policy, batch = make_micro_batch(lengths, seed, dtype)
    expected = whole(policy, batch, objective)
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(0, len(lengths)))
    parts = [rows for rows in (order[:cut], order[cut:]) if rows]
    assert_same(in_parts(policy, batch, objective, parts), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@settings(deadline=None, max_examples=30)
@given(lengths=LENGTH_LISTS, seed=st.integers(0, 999), objective=OBJECTIVES)
def test_packing_equals_one_sequence_at_a_time(dtype, tolerance, lengths, seed, objective):
    policy, batch = make_micro_batch(lengths, seed, dtype)
    parts = [[row] for row in range(len(lengths))]
    found = in_parts(policy, batch, objective, parts)
    assert_same(found, whole(policy, batch, objective), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@settings(deadline=None, max_examples=30)
@given(
    lengths=LENGTH_LISTS, seed=st.integers(0, 999), objective=OBJECTIVES, extra=st.integers(1, 5)
)
def test_padding_with_tokens_outside_the_mask_changes_nothing(
    dtype, tolerance, lengths, seed, objective, extra
):
    policy, batch = make_micro_batch(lengths, seed, dtype)
    expected = whole(policy, batch, objective)
    # Each sequence grows by `extra` tokens of garbage at its end.
    total, keep = int(batch.cu_seqlens[-1]), []
    padded = {name: [] for name in PER_TOKEN}
    for start, end in zip(
        batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True
    ):
        keep += [True] * (end - start) + [False] * extra
        for name in PER_TOKEN:
            value = vars(batch)[name]
            garbage = torch.zeros(extra, dtype=value.dtype)
            if value.dtype.is_floating_point:
                garbage += float("nan")
            padded[name] += [value[start:end], garbage]
    keep = torch.tensor(keep)
    grown = replace(
        batch,
        cu_seqlens=batch.cu_seqlens + extra * torch.arange(len(batch.cu_seqlens)),
        **{name: torch.cat(rows) for name, rows in padded.items()},
    )
    longer = torch.full((len(keep),), float("nan"), dtype=dtype)
    longer[keep] = policy.detach()
    loss, grad, metrics = whole(longer, grown, objective)
    assert int(keep.sum()) == total
    assert (grad[~keep] == 0).all()
    assert_same((loss, grad[keep], metrics), expected, tolerance)


def test_the_parts_add_up_by_hand():
    policy, batch = make_micro_batch([(1, 3), (2, 2)], seed=1)
    loss, correction, kl = GRPOLoss(), TokenTIS(), KLPenalty(0.1)
    found, metrics = minibatch_loss(
        policy,
        batch,
        loss,
        aggregation=TokenMean(),
        correction=correction,
        kl=kl,
        entropy_coefficient=0.01,
    )
    token_loss = loss(policy, batch)[0] * correction(batch.proximal_logprobs, batch)[0]
    token_loss = token_loss + kl(policy, batch)[0] - 0.01 * batch.entropy
    assert torch.allclose(found, token_loss[batch.loss_mask].mean())
    assert {
        "ratio/mean",
        "correction/weight_mean",
        "policy/kl_reference",
        "policy/entropy",
    } <= set(metrics)


def test_before_the_clip_bites_decoupled_and_bypass_have_the_same_gradient():
    policy, batch = make_micro_batch([(1, 6), (2, 5)], seed=2, spread=0.01)
    bypass = whole(
        policy,
        replace(batch, proximal_logprobs=batch.behavior_logprobs),
        {"loss": GRPOLoss(), "aggregation": TokenMean()},
    )
    decoupled = whole(
        policy, batch, {"loss": GRPOLoss(), "aggregation": TokenMean(), "correction": TokenTIS()}
    )
    assert torch.allclose(bypass[1], decoupled[1], atol=1e-14)


def test_without_proximal_logprobs_the_policy_is_its_own_anchor_and_the_correction_still_acts():
    policy, batch = make_micro_batch([(1, 6), (2, 5)], seed=2)
    objective = {"loss": GRPOLoss(), "aggregation": TokenMean(), "correction": TokenTIS()}
    found = whole(policy, replace(batch, proximal_logprobs=None), objective)
    ratio = (policy.detach() - batch.behavior_logprobs).exp().clamp_max(2.0)
    expected = -TokenMean().weights(batch) * ratio * batch.advantages
    assert torch.allclose(found[1], expected, atol=1e-14)
    assert found[2]["ratio/max"] == 1.0


def test_a_loss_may_be_a_plain_function_that_finds_its_anchor_in_the_batch():
    policy, batch = make_micro_batch([(1, 3)])
    batch = replace(batch, proximal_logprobs=None)

    def plain(policy_logprobs, micro_batch):
        ratio = (policy_logprobs - micro_batch.proximal_logprobs).exp()
        return -ratio * micro_batch.advantages, {}

    found, _ = minibatch_loss(policy, batch, plain, aggregation=TokenMean())
    assert torch.allclose(found, -batch.advantages[batch.loss_mask].mean())


def test_an_entropy_bonus_without_entropies_is_refused():
    policy, batch = make_micro_batch([(1, 3)])
    with pytest.raises(ValueError, match=r"`batch\.entropy` must be set"):
        minibatch_loss(
            policy,
            replace(batch, entropy=None),
            GRPOLoss(),
            aggregation=TokenMean(),
            entropy_coefficient=0.1,
        )


# ---- aggregation --------------------------------------------------------------------------------


def batch_of_two():
    _, batch = make_micro_batch([(1, 2), (1, 4)])
    mask = torch.tensor([False, True, True, False, True, True, True, False])
    return replace(batch, loss_mask=mask, denominators=Denominators(10, 4, 2))


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        (TokenMean(), 1 / 10, 1 / 10),
        (SequenceMean(), 1 / (2 * 4), 1 / (3 * 4)),
        (ConstantLength(20), 1 / (20 * 4), 1 / (20 * 4)),
    ],
)
def test_weights_by_hand_use_the_global_denominators(aggregation, first, second):
    expected = [0, first, first, 0, second, second, second, 0]
    assert aggregation.weights(batch_of_two()).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), ConstantLength(3)])
def test_a_minibatch_without_a_single_loss_token_weighs_nothing(aggregation):
    batch = replace(
        batch_of_two(),
        loss_mask=torch.zeros(8, dtype=torch.bool),
        denominators=Denominators(0, 0, 0),
    )
    assert (aggregation.weights(batch) == 0).all()


def test_a_constant_length_of_zero_is_refused():
    with pytest.raises(ConfigError, match="`tokens` must be >= 1"):
        ConstantLength(0)


# -- the expected gradient of each estimator, by enumeration of a small tabular policy -------------


ACTIONS = 5


def policies(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, ACTIONS, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].log_softmax(0), logits[2].log_softmax(0)


def every_action(behavior):
    """A batch with one token for each action, all in the loss."""
    _, batch = make_micro_batch([(0, ACTIONS)])
    return replace(
        batch, behavior_logprobs=behavior, loss_mask=torch.ones(ACTIONS, dtype=torch.bool)
    )


def expected_gradient(estimator, off_policy):
    """Of the loss, over actions drawn from the policy or from the behavior policy."""
    logits, reference, other = policies()
    logprobs = logits.log_softmax(0)
    behavior = other if off_policy else logprobs.detach()
    loss = (behavior.exp() * estimator(logprobs, reference, every_action(behavior))).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def kl_gradient(forward=False):
    logits, reference, _ = policies()
    logprobs = logits.log_softmax(0)
    kl = (
        (reference.exp() * (reference - logprobs)).sum()
        if forward
        else (logprobs.exp() * (logprobs - reference)).sum()
    )
    (gradient,) = torch.autograd.grad(kl, logits)
    return gradient


def close(left, right):
    return torch.allclose(left, right, atol=1e-12)


def test_k1_in_the_loss_is_useless_on_policy():
    assert close(expected_gradient(K1(), off_policy=False), torch.zeros(ACTIONS).double())


def test_k2_in_the_loss_has_the_gradient_of_the_reverse_kl_on_policy():
    assert close(expected_gradient(K2(), off_policy=False), kl_gradient())


def test_k3_in_the_loss_has_the_gradient_of_the_forward_kl_on_policy():
    assert close(expected_gradient(K3(), off_policy=False), kl_gradient(forward=True))
    assert not close(expected_gradient(K3(), off_policy=False), kl_gradient())


def test_weighted_k3_has_the_gradient_of_the_reverse_kl_on_samples_of_any_policy():
    assert close(expected_gradient(WeightedK3(), off_policy=False), kl_gradient())
    assert close(expected_gradient(WeightedK3(), off_policy=True), kl_gradient())


@pytest.mark.parametrize("estimator", [K2(), K3()], ids=repr)
def test_the_others_are_biased_off_policy(estimator):
    found = expected_gradient(estimator, off_policy=True)
    assert not close(found, kl_gradient())
    assert not close(found, kl_gradient(forward=True))


def test_without_the_gradient_through_the_ratio_it_is_the_forward_kl():
    logits, reference, behavior = policies()
    logprobs = logits.log_softmax(0)
    batch = every_action(behavior)
    ratio = (logprobs.detach() - behavior).exp()
    loss = (behavior.exp() * ratio * K3()(logprobs, reference, batch)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert close(gradient, kl_gradient(forward=True))


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_value_of_weighted_k3_expects_to_the_kl(off_policy):
    logits, reference, other = policies()
    logprobs = logits.log_softmax(0).detach()
    behavior = other if off_policy else logprobs
    estimate = (behavior.exp() * WeightedK3()(logprobs, reference, every_action(behavior))).sum()
    assert close(estimate, (logprobs.exp() * (logprobs - reference)).sum())


def test_estimates_by_hand():
    _, batch = make_micro_batch([(0, 1)])
    batch = replace(
        batch, loss_mask=torch.tensor([True]), behavior_logprobs=torch.tensor([0.4]).log()
    )
    policy, reference = torch.tensor([0.2]).log(), torch.tensor([0.1]).log()
    assert K1()(policy, reference, batch).item() == pytest.approx(0.6931472)
    assert K2()(policy, reference, batch).item() == pytest.approx(0.2402265)
    assert K3()(policy, reference, batch).item() == pytest.approx(0.1931472, rel=1e-5)
    assert WeightedK3()(policy, reference, batch).item() == pytest.approx(0.5 * 0.193147, rel=1e-5)


def test_the_penalty_is_the_coefficient_times_the_estimate_and_logs_the_estimate():
    policy, batch = make_micro_batch([(1, 4), (2, 2)])
    penalty, metrics = KLPenalty(0.1)(policy, batch)
    estimate = WeightedK3()(policy, batch.reference_logprobs, batch)
    assert torch.allclose(penalty, 0.1 * estimate)
    mean = estimate[batch.loss_mask].mean().item()
    assert values(metrics)["policy/kl_reference"] == pytest.approx(mean)


def test_a_penalty_that_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="`coefficient` must be > 0, got 0"):
        KLPenalty(0.0)
    with pytest.raises(ConfigError, match="`estimator` must have a gradient, got K1"):
        KLPenalty(0.1, K1())
    policy, batch = make_micro_batch([(1, 4)])
    with pytest.raises(ValueError, match="reference_logprobs"):
        KLPenalty(0.1)(policy, replace(batch, reference_logprobs=None))


def test_each_estimator_is_a_penalty_on_the_next_token_not_on_the_sequence():
    """Two tokens of two kinds: agreement after A, a divergence after B; both equal at first."""
    first = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    after_b = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    agreeing = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    reference = (agreeing, torch.stack([agreeing, after_b]))
    policy = (first.log_softmax(-1), second.log_softmax(-1))

    def next_token_kl(policy, reference):
        return (policy.exp() * (policy - reference)).sum(-1)

    # Every sequence x y, weighed by its probability, which has no gradient: samples.
    estimate = torch.zeros((), dtype=torch.float64)
    for x in range(2):
        for y in range(2):
            logprobs = torch.stack([policy[0][x], policy[1][x, y]])
            expected = torch.stack([reference[0][x], reference[1][x, y]])
            _, batch = make_micro_batch([(0, 2)])
            mask = torch.ones(2, dtype=torch.bool)
            batch = replace(batch, behavior_logprobs=logprobs.detach(), loss_mask=mask)
            weight = logprobs.detach().sum().exp()
            estimate = estimate + weight * WeightedK3()(logprobs, expected, batch).sum()
    found = torch.autograd.grad(estimate, (first, second), retain_graph=True)

    kl_first = next_token_kl(policy[0], reference[0])
    kl_second = next_token_kl(policy[1], reference[1])
    visited = policy[0].exp()
    fixed = kl_first + (visited.detach() * kl_second).sum()
    expected = torch.autograd.grad(fixed, (first, second), retain_graph=True)
    assert all(close(left, right) for left, right in zip(found, expected, strict=True))
    whole = torch.autograd.grad(kl_first + (visited * kl_second).sum(), (first, second))
    # What is left out: B's share of the blame, 1/4 of the divergence after it.
    assert close(found[0], torch.zeros(2).double())
    assert whole[0][1].item() == pytest.approx(kl_second[1].item() / 4)
    assert close(found[1], whole[1])


# -- losses and gradients equal those of TRL 1.16: its numbers are committed, it need not be there


TRL_TOLERANCE = 1e-5


def golden():
    return json.loads(GOLDEN.read_text())


def has_trl():
    return (
        importlib.util.find_spec("trl") is not None
        and importlib.metadata.version("trl") == golden()["trl"]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradient_norm_equal_the_committed_numbers_of_trl(case):
    expected = golden()["cases"][case.name]
    loss, gradients = ours(case, golden()["inputs"])
    assert loss == pytest.approx(expected["loss"], abs=TRL_TOLERANCE)
    assert grad_norm(gradients) == pytest.approx(expected["grad_norm"], rel=TRL_TOLERANCE)


def test_the_committed_numbers_tell_the_cases_apart():
    norms = sorted(case["grad_norm"] for name, case in golden()["cases"].items() if name != "bnpo")
    gaps = [right / left - 1 for left, right in pairwise(norms)]
    assert min(gaps) > 10 * TRL_TOLERANCE


@pytest.mark.skipif(not has_trl(), reason="trl==1.16.0 is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_equals_that_of_trl_itself(case):
    inputs = golden()["inputs"]
    loss, gradients = ours(case, inputs)
    trl_loss, trl_gradients = trls(case, inputs)
    assert loss == pytest.approx(trl_loss, abs=TRL_TOLERANCE)
    assert set(gradients) == set(trl_gradients)
    difference = {name: gradients[name] - trl_gradients[name] for name in gradients}
    assert grad_norm(difference) <= TRL_TOLERANCE * grad_norm(trl_gradients)
