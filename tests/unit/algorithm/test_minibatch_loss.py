from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.algorithm.corrections import IcePop, SequenceTIS, TokenTIS
from lightning_grpo.algorithm.kl import KLPenalty
from lightning_grpo.algorithm.losses import (
    CISPOLoss,
    ConstantLength,
    DPPOLoss,
    GRPOLoss,
    GSPOLoss,
    SAPOLoss,
    SequenceMean,
    TokenMean,
)
from lightning_grpo.algorithm.metrics import merge, values
from lightning_grpo.objective import minibatch_loss
from tests.fakes.micro_batches import PER_TOKEN, make_micro_batch, select_sequences

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
LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=2, max_size=6)
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
@given(lengths=LENGTHS, seed=st.integers(0, 999), objective=OBJECTIVES, data=st.data())
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
@given(lengths=LENGTHS, seed=st.integers(0, 999), objective=OBJECTIVES)
def test_packing_equals_one_sequence_at_a_time(dtype, tolerance, lengths, seed, objective):
    policy, batch = make_micro_batch(lengths, seed, dtype)
    parts = [[row] for row in range(len(lengths))]
    found = in_parts(policy, batch, objective, parts)
    assert_same(found, whole(policy, batch, objective), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=st.integers(0, 999), objective=OBJECTIVES, extra=st.integers(1, 5))
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
