"""What is minimized, and where the clip is anchored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.algorithm.corrections import TokenTIS
from lightning_grpo.algorithm.layers import Replay
from lightning_grpo.algorithm.losses import GRPOLoss, KLPenalty, M2POLoss, SequenceMean, TokenMean
from lightning_grpo.algorithm.metrics import merge, values
from lightning_grpo.loader import Minibatch, Prepared, Rollout, Shape, Taken, split
from lightning_grpo.objective import Objective, score
from lightning_grpo.policy.packed import PackedPolicy
from tests.fakes.causal_models import make_causal_model
from tests.fakes.mixtures import make_mixture
from tests.fakes.tiny_run import make_group

CPU = torch.device("cpu")


def make_rollout(max_tokens: int = 9) -> Rollout:
    groups = [make_group(row, (0.0, 1.0, 0.25)) for row in range(2)]
    batch = RolloutBatch.from_groups(groups, version=0)
    trained = torch.ones(len(batch), dtype=torch.bool)
    prepared = Prepared(batch.rewards, trained)
    (share,) = split(Taken(0, 0, batch, {}, groups), prepared, Shape(1, 1, max_tokens))
    return Rollout(**vars(Taken(0, 0, batch, {}, None)), **vars(share), advantages=batch.rewards)


@pytest.fixture(scope="module")
def policy() -> PackedPolicy:
    return PackedPolicy(make_causal_model())


def test_without_a_correction_the_clip_is_anchored_at_the_behavior_policy(policy):
    rollout = make_rollout()
    Objective(GRPOLoss()).anchor(policy, rollout, 4, CPU)
    assert rollout.proximal_logprobs is rollout.sequences.behavior_logprobs


def test_with_a_correction_and_one_step_the_policy_anchors_itself_without_a_pass(policy):
    rollout = make_rollout()
    Objective(GRPOLoss(), TokenTIS()).anchor(policy, rollout, 1, CPU)
    assert rollout.proximal_logprobs is None


def test_with_a_correction_and_several_steps_the_policy_is_scored_in_training_s_own_passes(policy):
    rollout = make_rollout()
    Objective(GRPOLoss(), TokenTIS()).anchor(policy, rollout, 2, CPU)
    minibatch = Minibatch(rollout, 0, 0, is_first=True, is_last=True)
    assert minibatch.num_micro_batches > 1
    for k in range(minibatch.num_micro_batches):
        batch = minibatch.micro_batch(k)
        logprobs, _ = policy(batch.input_ids, batch.cu_seqlens, batch.temperature)
        mask = batch.response_mask
        assert torch.equal(batch.proximal_logprobs[mask], logprobs[mask].detach())


def test_scores_do_not_depend_on_how_sequences_are_packed(policy):
    narrow, wide = make_rollout(4), make_rollout(1000)
    row_order = torch.argsort(narrow.sequences.trajectory_index)
    one = score(policy, narrow, CPU).view(6, 4)[row_order]
    other = score(policy, wide, CPU).view(6, 4)[torch.argsort(wide.sequences.trajectory_index)]
    assert torch.allclose(one, other, atol=1e-6)


def test_a_kl_penalty_scores_its_reference(policy):
    rollout, reference = make_rollout(), PackedPolicy(make_causal_model(seed=1))
    objective = Objective(GRPOLoss(), kl=KLPenalty(0.1))
    objective.anchor(policy, rollout, 1, CPU, reference)
    assert torch.equal(rollout.reference_logprobs, score(reference, rollout, CPU))
    minibatch = Minibatch(rollout, 0, 0, is_first=True, is_last=True)
    _, metrics = objective.micro_batch_loss(policy, minibatch, 0, CPU)
    assert float(metrics["policy/kl_reference"].value()) > 0
    with pytest.raises(AssertionError, match="reference"):
        objective.anchor(policy, make_rollout(), 1, CPU)


def test_only_losses_that_are_proportional_to_the_advantage_skip_zeros():
    assert Objective(GRPOLoss()).skips_zero_advantages
    assert not Objective(M2POLoss()).skips_zero_advantages
    assert not Objective(GRPOLoss(), kl=KLPenalty(0.1)).skips_zero_advantages
    assert not Objective(GRPOLoss(), entropy_coefficient=0.01).skips_zero_advantages
    assert not Objective(lambda logprobs, batch: (logprobs, {})).skips_zero_advantages


def test_a_subclass_skips_zeros_as_its_parent_unless_it_computes_another_loss():
    class Wider(GRPOLoss):
        """The same formula with other bounds."""

    class WithBonus(GRPOLoss):
        def __call__(self, policy_logprobs, batch):
            loss, metrics = super().__call__(policy_logprobs, batch)
            return loss - policy_logprobs, metrics

    class Scaled(GRPOLoss):
        is_zero_at_zero_advantage = True

        def __call__(self, policy_logprobs, batch):
            loss, metrics = super().__call__(policy_logprobs, batch)
            return 2 * loss, metrics

    assert Objective(Wider()).skips_zero_advantages
    assert not Objective(WithBonus()).skips_zero_advantages
    assert Objective(Scaled()).skips_zero_advantages


def test_a_plain_function_is_a_loss_and_gets_the_mean_over_tokens(policy):
    def reinforce(logprobs, batch):
        return -batch.advantages * logprobs, {}

    assert isinstance(Objective(reinforce).aggregation, TokenMean)
    assert isinstance(Objective(GRPOLoss(aggregation=SequenceMean())).aggregation, SequenceMean)
    rollout = make_rollout(1000)
    objective = Objective(reinforce)
    objective.anchor(policy, rollout, 1, CPU)
    minibatch = Minibatch(rollout, 0, 0, is_first=True, is_last=True)
    loss, metrics = objective.micro_batch_loss(policy, minibatch, 0, CPU)
    batch = minibatch.micro_batch(0)
    logprobs, _ = policy(batch.input_ids, batch.cu_seqlens, batch.temperature)
    expected = -(batch.advantages * logprobs)[batch.loss_mask].mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert {"policy/loss", "policy/entropy", "mismatch/abs_logprob_diff"} <= metrics.keys()


def test_entropy_is_reported_without_a_gradient_unless_it_is_rewarded(policy):
    rollout = make_rollout(1000)
    minibatch = Minibatch(rollout, 0, 0, is_first=False, is_last=True)
    gradients = []
    for coefficient in (0.0, 1.0):
        objective = Objective(lambda logprobs, batch: (0 * logprobs, {}), None, None, coefficient)
        loss, metrics = objective.micro_batch_loss(policy, minibatch, 0, CPU)
        policy.zero_grad()
        loss.backward()
        gradients.append(float(torch.nn.utils.get_total_norm(p.grad for p in policy.parameters())))
        assert "mismatch/abs_logprob_diff" not in metrics  # only where the batch is new
    assert gradients[0] == 0
    assert gradients[1] > 0


def routed_rollout(policy, max_tokens: int = 9) -> Rollout:
    """Random experts for all tokens but the last of each trajectory."""
    rollout = make_rollout(max_tokens)
    generator = torch.Generator().manual_seed(0)
    tokens = rollout.sequences.num_tokens
    experts = torch.rand(tokens, 3, 8, generator=generator).topk(2, dim=-1).indices
    experts[rollout.sequences.cu_seqlens[1:] - 1] = -1
    rollout.sequences = replace(rollout.sequences, routes=experts.to(torch.uint8))
    return rollout


@pytest.fixture(scope="module")
def mixture() -> PackedPolicy:
    return PackedPolicy(make_mixture("qwen3_moe"), router_replay=True)


def test_proximal_and_training_passes_replay_and_the_reference_chooses_for_itself(mixture):
    rollout = routed_rollout(mixture)
    objective = Objective(GRPOLoss(), TokenTIS(), KLPenalty(0.1))
    objective.anchor(mixture, rollout, 2, CPU, mixture)
    sequences = rollout.sequences
    mask = sequences.response_mask
    with torch.no_grad():
        replayed, alone = (
            mixture(sequences.input_ids, sequences.cu_seqlens, replay=replay)[0][mask]
            for replay in (Replay(sequences.routes), None)
        )
    assert torch.allclose(rollout.proximal_logprobs[mask], replayed, atol=1e-5)
    assert torch.allclose(rollout.reference_logprobs[mask], alone, atol=1e-5)
    assert not torch.allclose(replayed, alone, atol=1e-2)


def test_what_was_replayed_and_rerouted_is_counted_over_micro_batches(mixture):
    rollout = routed_rollout(mixture)
    minibatch = Minibatch(rollout, 0, 0, is_first=True, is_last=True)
    objective, metrics = Objective(GRPOLoss()), {}
    objective.anchor(mixture, rollout, 1, CPU)
    assert minibatch.num_micro_batches > 1
    for k in range(minibatch.num_micro_batches):
        _, more = objective.micro_batch_loss(mixture, minibatch, k, CPU)
        metrics = merge(metrics, more)
    logged = values(metrics)
    assert 0.5 < logged["moe/replayed"] < 1.0
    assert 0.5 < logged["moe/rerouted"] <= 1.0
    rollout.sequences = replace(rollout.sequences, routes=None)
    _, metrics = objective.micro_batch_loss(mixture, minibatch, 0, CPU)
    assert not any(name.startswith("moe/") for name in metrics)


def test_a_filler_counts_nothing_as_not_replayed(mixture):
    rollout = routed_rollout(mixture)
    rollout.plans = [[[]]]
    minibatch = Minibatch(rollout, 0, 0, is_first=True, is_last=True)
    objective = Objective(GRPOLoss())
    objective.anchor(mixture, rollout, 1, CPU)
    _, metrics = objective.micro_batch_loss(mixture, minibatch, 0, CPU)
    assert {"moe/replayed", "moe/rerouted"} < metrics.keys()  # every rank has the same names
    assert not any(name.startswith("moe/") for name in values(metrics))
