import pytest
import torch

from lightning_grpo.algorithm.overlong import drop_truncated, soft_overlong_penalty
from lightning_grpo.errors import ConfigError


def test_the_penalty_falls_from_zero_to_minus_one_over_the_buffer():
    lengths = torch.tensor([1, 80, 85, 90, 100, 120])
    expected = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert soft_overlong_penalty(lengths, 100, 20).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("buffer", [0, 101])
def test_a_buffer_that_is_no_part_of_the_length_is_refused(buffer):
    with pytest.raises(ConfigError, match="`buffer` must be between 1 and"):
        soft_overlong_penalty(torch.tensor([1]), 100, buffer)


def test_tokens_of_truncated_sequences_leave_the_loss():
    mask = torch.tensor([False, True, True, False, True])
    cu_seqlens = torch.tensor([0, 3, 5])
    kept = drop_truncated(mask, torch.tensor([True, False]), cu_seqlens)
    assert kept.tolist() == [False, False, False, False, True]
