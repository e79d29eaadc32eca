"""The expected gradient of each estimator, by enumeration of a small tabular policy."""

from dataclasses import replace

import pytest
import torch

from lightning_grpo.algorithm.kl import K1, K2, K3, KLPenalty, WeightedK3
from lightning_grpo.algorithm.metrics import values
from lightning_grpo.errors import ConfigError
from tests.fakes.micro_batches import make_micro_batch

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
