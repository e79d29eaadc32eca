import pytest
import torch

from lightning_grpo.algorithm.metrics import zero_variance_fraction


@pytest.mark.parametrize("size", [3, 6, 7, 8])
@pytest.mark.parametrize("reward", [0.0, 0.3, 0.7, 123.4, -1e-4])
def test_equal_rewards_have_no_variance_whatever_their_mean_rounds_to(reward, size):
    rewards = torch.tensor([reward] * size + [reward] * (size - 1) + [reward + 0.1])
    group_ids = torch.tensor([0] * size + [1] * size)
    assert zero_variance_fraction(rewards, group_ids).item() == 0.5
