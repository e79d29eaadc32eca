import copy

import lightning as L
import pytest
import torch

from lightning_grpo.errors import ConfigError, WeightSyncError
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.session.proof import DRIFT, SnapshotScorer, TrainerProof, packed
from lightning_grpo.session.proof import policy_scores as scores_and_kind
from lightning_grpo.weights.gather import gather_weights
from lightning_grpo.weights.proof import Probe, mean_difference
from tests.fakes.causal_models import make_model_of
from tests.fakes.tiny_lm import VOCAB, make_lm

SEQUENCES = tuple(
    tuple(torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (40, 7)
)


def policy_scores(policy):
    with torch.no_grad():
        return [policy(torch.tensor(ids))[0].tolist() for ids in SEQUENCES]


def close(left, right):
    pairs = zip(left, right, strict=True)
    return all(torch.allclose(torch.tensor(a), torch.tensor(b), atol=2e-6) for a, b in pairs)


@pytest.mark.parametrize("tied", [True, False])
def test_a_snapshot_scores_as_the_policy_that_it_was_taken_of(tied):
    policy = PackedPolicy(make_lm(tied))
    scorer = SnapshotScorer(policy.model)
    scorer.hold(gather_weights(policy))
    assert close(scorer.scores(SEQUENCES), policy_scores(policy))


def test_the_snapshot_is_scored_and_not_what_the_policy_has_become_since():
    policy = PackedPolicy(make_lm())
    scorer = SnapshotScorer(policy.model)
    scorer.hold(gather_weights(policy))
    before = policy_scores(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert close(scorer.scores(SEQUENCES), before)
    scorer.hold(gather_weights(policy))
    assert close(scorer.scores(SEQUENCES), policy_scores(policy))


def test_memory_that_is_kept_is_written_to_and_scored_where_it_is():
    policy = PackedPolicy(make_lm())
    scorer = SnapshotScorer(policy.model, keep_memory=True)
    assert scorer.memory is None
    first = gather_weights(policy)
    scorer.hold(first)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    again = gather_weights(policy, into=scorer.memory)
    assert again is first
    scorer.hold(again)
    assert close(scorer.scores(SEQUENCES), policy_scores(policy))


def test_adapters_are_part_of_what_is_scored():
    policy = PackedPolicy(make_lm())
    base = policy_scores(policy)
    LoRA(rank=2).add_to(policy.model)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    scorer = SnapshotScorer(policy.model)
    scorer.hold(gather_weights(policy))
    scores = scorer.scores(SEQUENCES)
    assert close(scores, policy_scores(policy))
    assert not close(scores, base)


def test_rounding_is_measured_by_precision_and_leaves_the_snapshot_alone():
    policy = PackedPolicy(make_lm())
    scorer = SnapshotScorer(policy.model)
    scorer.hold(gather_weights(policy, torch.bfloat16))
    before = scorer.scores(SEQUENCES)
    kinds = ["float32", "float16", "bfloat16", "fp8"]
    measured = [scorer.rounding(SEQUENCES, kind) for kind in kinds]
    assert measured == sorted(measured)
    assert 0 < measured[0] < 1e-5
    assert measured[2] > 4 * measured[1]
    nearest, by_chance = (scorer.weight_rounding(SEQUENCES, steps) for steps in (0.5, 1.0))
    assert 1.5 < by_chance / nearest < 2.5
    assert scorer.scores(SEQUENCES) == before


def test_the_rounding_that_is_measured_is_the_rounding_that_occurs():
    policy = PackedPolicy(make_lm())
    exact = policy_scores(policy)
    scorer = SnapshotScorer(policy.model)
    scorer.hold(gather_weights(policy, torch.bfloat16))
    pairs = list(zip(exact, scorer.scores(SEQUENCES), strict=True))
    moves = [abs(a - b) for left, right in pairs for a, b in zip(left[1:], right[1:], strict=True)]
    compute = scorer.rounding(SEQUENCES, "bfloat16")
    predicted = (compute**2 + scorer.weight_rounding(SEQUENCES) ** 2) ** 0.5
    assert 0.5 < sum(moves) / len(moves) / predicted < 2


@pytest.mark.parametrize("change", ["missing", "further"])
def test_weights_of_another_model_are_refused_by_name(change):
    policy = PackedPolicy(make_lm())
    snapshot = dict(gather_weights(policy))
    if change == "missing":
        del snapshot["model.norm.weight"]
    else:
        snapshot["model.norm.bias"] = torch.zeros(1)
    with pytest.raises(WeightSyncError, match=r"model\.norm\.(weight|bias) differs"):
        SnapshotScorer(policy.model).hold(snapshot)


def test_a_class_that_its_config_does_not_build_is_refused():
    class Needs(type(make_lm())):
        def __init__(self, config, more):
            super().__init__(config)

    model = Needs(copy.deepcopy(make_lm().config), 1)
    with pytest.raises(WeightSyncError, match="Needs can't be built from its config"):
        SnapshotScorer(model)


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24},
    **{"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]},
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mixtral", {"sliding_window": None}),  # grouped products of experts know no float64
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}),
        ("phimoe", {"sliding_window": 8}),
        ("granite", {"logits_scaling": 0.3}),
        ("nanochat", {"final_logit_softcapping": 1.0}),
        ("gpt_oss", {"sliding_window": 5}),
        ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 0.5}),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
    ],
)
def test_other_architectures_are_scored_and_their_rounding_is_measured(kind, settings):
    policy = PackedPolicy(make_model_of(kind, **settings))
    scorer = SnapshotScorer(policy.model)
    scorer.hold(gather_weights(policy))
    assert close(scorer.scores(SEQUENCES), policy_scores(policy))
    assert 0 < scorer.rounding(SEQUENCES, "float32") < 1e-5
    assert close(scorer.scores(SEQUENCES), policy_scores(policy))


def test_the_rounding_of_scaled_logits_is_scaled_with_them():
    found = []
    for scaling in (1.0, 100.0):
        policy = PackedPolicy(make_model_of("granite", logits_scaling=scaling))
        scorer = SnapshotScorer(policy.model)
        scorer.hold(gather_weights(policy))
        found.append(scorer.rounding(SEQUENCES, "bfloat16"))
    assert found[1] < 0.03 * found[0]


def test_the_proof_finds_the_policy_inside_of_what_fabric_made_of_it():
    policy = PackedPolicy(make_lm(seed=3))
    fabric = L.Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup(policy)
    assert packed(wrapped) is policy
    scores, kind = scores_and_kind(wrapped, [[3, 9, 4, 7]])
    assert scores == scores_and_kind(policy, [[3, 9, 4, 7]])[0]
    assert kind == "float32"
    with pytest.raises(ConfigError, match="must be a PackedPolicy, or what Fabric made of one"):
        packed(torch.nn.Linear(2, 2))


def test_rounding_that_drifts_is_measured_again_after_a_proof_and_not_before_the_next():
    policy = PackedPolicy(make_lm())
    sequences = tuple(tuple(ids) for ids in SEQUENCES)
    proof = TrainerProof(Probe(sequences), ["float32"])

    def publish(version):
        sent = proof.score(policy, gather_weights(policy, None))
        proof.check_policy(version, sent, *scores_and_kind(policy, sequences), merged=False)
        return sent

    first = publish(0)
    with torch.no_grad():
        while mean_difference(first.scores, policy_scores(policy)) <= DRIFT / 2:
            policy.model.get_output_embeddings().weight.mul_(1.05)
    assert mean_difference(first.scores, policy_scores(policy)) < DRIFT
    assert publish(1).rounding == first.rounding
    assert publish(2).rounding != first.rounding
