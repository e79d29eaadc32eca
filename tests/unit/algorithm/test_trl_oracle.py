"""Losses and gradients equal those of TRL 1.16: its numbers are committed, it need not be there."""

import importlib.metadata
import importlib.util
import json
from itertools import pairwise

import pytest

from tests.fakes.trl_oracle import CASES, GOLDEN, grad_norm, ours, trls

TOLERANCE = 1e-5


def golden():
    return json.loads(GOLDEN.read_text())


def has_trl():
    return (
        importlib.util.find_spec("trl") is not None
        and importlib.metadata.version("trl") == golden()["trl"]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradient_norm_equal_the_committed_numbers_of_trl(case):
    expected = golden()["cases"][case.name]
    loss, gradients = ours(case, golden()["inputs"])
    assert loss == pytest.approx(expected["loss"], abs=TOLERANCE)
    assert grad_norm(gradients) == pytest.approx(expected["grad_norm"], rel=TOLERANCE)


def test_the_committed_numbers_tell_the_cases_apart():
    norms = sorted(case["grad_norm"] for name, case in golden()["cases"].items() if name != "bnpo")
    gaps = [right / left - 1 for left, right in pairwise(norms)]
    assert min(gaps) > 10 * TOLERANCE


@pytest.mark.skipif(not has_trl(), reason="trl==1.16.0 is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_equals_that_of_trl_itself(case):
    inputs = golden()["inputs"]
    loss, gradients = ours(case, inputs)
    trl_loss, trl_gradients = trls(case, inputs)
    assert loss == pytest.approx(trl_loss, abs=TOLERANCE)
    assert set(gradients) == set(trl_gradients)
    difference = {name: gradients[name] - trl_gradients[name] for name in gradients}
    assert grad_norm(difference) <= TOLERANCE * grad_norm(trl_gradients)
