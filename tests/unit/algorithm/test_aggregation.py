from dataclasses import replace

import pytest
import torch

from lightning_grpo.algorithm.batch import Denominators
from lightning_grpo.algorithm.losses import ConstantLength, SequenceMean, TokenMean
from lightning_grpo.errors import ConfigError
from tests.fakes.micro_batches import make_micro_batch


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
