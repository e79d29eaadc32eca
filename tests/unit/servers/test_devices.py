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
    ],
)
def test_half_of_the_gpus_rounded_up_serve_and_the_others_train(present, serving, training):
    assert serving_devices(present) == serving
    assert training_devices(present, serving) == training
