import pytest

from lightning_grpo.errors import WeightSyncError
from lightning_grpo.weights.probe import Probe, ProbeRecord, mean_difference

EXACT = Probe(((1, 2, 3),), exact=True)
ROUNDED = Probe(((1, 2, 3),), exact=False)
BASE = [[0.0, -1.0, -2.0]]


def moved(by):
    return [[0.0, *(x + by for x in BASE[0][1:])]]


def test_the_first_token_says_nothing():
    assert mean_difference([[5.0, -1.0]], [[0.0, -1.5]]) == 0.5


def test_exact_weights_must_agree_to_a_ten_thousandth():
    record = ProbeRecord(EXACT)
    assert record.check("a", 1, BASE, moved(5e-5)).diff == pytest.approx(5e-5)
    with pytest.raises(WeightSyncError, match="a does not hold version 2"):
        record.check("a", 2, BASE, moved(2e-4))


def test_in_lower_precision_the_limit_follows_the_first_reading():
    record = ProbeRecord(ROUNDED)
    record.check("a", 1, BASE, moved(0.02))
    record.check("a", 2, moved(0.1), moved(0.15))
    with pytest.raises(WeightSyncError, match=r"at most 0\.06"):
        record.check("a", 3, BASE, moved(0.08))
    with pytest.raises(WeightSyncError):
        record.check("b", 1, BASE, moved(1.0))


def test_a_reading_says_how_far_both_sides_moved():
    record = ProbeRecord(EXACT)
    record.check("a", 1, BASE, BASE)
    reading = record.check("a", 2, moved(0.3), moved(0.3))
    assert reading.change == pytest.approx(0.3)
    assert reading.server_change == pytest.approx(0.3)


def test_a_server_that_stays_the_same_to_the_last_bit_is_found_out_below_the_limit():
    record = ProbeRecord(EXACT)
    record.check("a", 1, BASE, moved(1e-6))
    with pytest.raises(WeightSyncError, match="did not change"):
        record.check("a", 2, moved(5e-5), moved(1e-6))


def test_a_trainer_that_did_not_move_either_is_no_alarm():
    record = ProbeRecord(EXACT)
    record.check("a", 1, BASE, moved(1e-6))
    record.check("a", 2, BASE, moved(1e-6))


def test_a_replaced_server_has_no_history():
    record = ProbeRecord(EXACT)
    record.check("a", 1, BASE, moved(1e-6))
    record.forget("a")
    assert record.check("a", 2, moved(5e-5), moved(1e-6)).change is None


def test_a_score_that_is_no_number_agrees_with_nothing():
    record = ProbeRecord(EXACT)
    nan = [[0.0, float("nan"), -2.0]]
    assert not record.agrees(BASE, nan)
    with pytest.raises(WeightSyncError):
        record.check("a", 1, BASE, nan)
