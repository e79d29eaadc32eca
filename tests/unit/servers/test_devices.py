"""Which GPUs serve and which train."""

from __future__ import annotations

import pytest

from lightning_grpo.servers.base import serving_devices, training_devices


@pytest.mark.parametrize(
    ("present", "serving", "training"),
    [
        ([0], [0], [0]),
        ([0, 1], [1], [0]),
        ([0, 1, 2], [1, 2], [0]),
        ([0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7], [0, 1, 2, 3]),
        ([4, 6], [6], [0]),
    ],
)
def test_half_of_the_gpus_rounded_up_serve_and_the_others_train(present, serving, training):
    assert serving_devices(present) == serving
    assert training_devices(present, serving) == training


def test_the_trainer_counts_among_the_gpus_that_are_visible():
    assert training_devices([2, 3, 5], serving=[3]) == [0, 2]
