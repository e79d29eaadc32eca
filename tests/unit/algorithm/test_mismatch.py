from dataclasses import replace
from math import exp

import pytest
import torch

from lightning_grpo.algorithm.metrics import merge, mismatch_metrics, values
from tests.fakes.micro_batches import make_micro_batch, select_sequences


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
