import asyncio
import math
import random
from concurrent.futures import Future

import pytest

from lightning_grpo.errors import StopRun, WeightSyncError
from lightning_grpo.weights.proof import (
    FACTOR,
    FLOORS,
    Probe,
    Rounding,
    SentScores,
    ServerProof,
    TrainerFailedError,
    check_policy,
    mean_difference,
    promised,
    settled,
)


@pytest.mark.parametrize("error", [ArithmeticError, StopRun, KeyboardInterrupt])
def test_an_error_reaches_whoever_waits_for_what_was_promised_and_never_ends_the_loop(error):
    kept, broken = Future(), Future()

    def fail():
        with promised(kept, broken):
            kept.set_result(1)
            raise error

    async def wait():
        with pytest.raises(TrainerFailedError, match=error.__name__) as failed:
            await settled(broken)
        assert isinstance(failed.value.__cause__, error)

    with pytest.raises(error):
        fail()
    assert kept.result() == 1
    asyncio.run(wait())


def test_what_is_there_needs_no_waiting():
    assert asyncio.run(settled([[0.0]])) == [[0.0]]


# ---- probe --------------------------------------------------------------------------------------

PROBE = Probe(((1, 2, 3),))
BASE = [[0.0, -1.0, -2.0]]
ROUNDED = Rounding({"bfloat16": 0.02}, weights=0.01)


def moved(by):
    return [[0.0, *(x + by for x in BASE[0][1:])]]


def noisy(scores, by, seed):
    draw = random.Random(seed)
    return [[0.0, *(x + draw.gauss(0.0, by) for x in row[1:])] for row in scores]


def long_scores(seed, length=128):
    draw = random.Random(seed)
    return [[0.0, *(-3 * draw.random() for _ in range(length))]]


def sent(scores, kind="bfloat16"):
    return SentScores(scores, kind, ROUNDED)


def test_the_first_token_says_nothing():
    assert mean_difference([[5.0, -1.0]], [[0.0, -1.5]]) == 0.5


def test_in_fp32_weights_must_agree_to_a_few_hundred_thousandths():
    proof = ServerProof(PROBE)
    assert proof.check("a", 1, SentScores(BASE), moved(1e-5), "float32").diff == pytest.approx(1e-5)
    with pytest.raises(WeightSyncError, match="a holds other weights than were sent as version 2"):
        proof.check("a", 2, SentScores(BASE), moved(5e-5), "float32")


def test_the_limit_follows_the_rounding_of_both_sides_and_never_a_first_reading():
    proof = ServerProof(PROBE)
    limit = FACTOR * math.hypot(0.02, 0.02)
    assert proof.check("a", 1, sent(BASE), moved(1e-4), "bfloat16").limit == pytest.approx(limit)
    proof.check("a", 2, sent(BASE), moved(0.9 * limit), "bfloat16")
    with pytest.raises(WeightSyncError, match=rf"at most {limit:.3g} is rounding"):
        proof.check("a", 3, sent(BASE), moved(1.1 * limit), "bfloat16")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("auto", "bfloat16"), ("half", "float16"), ("float", "float32"), ("w8a8_fp8", "fp8")],
)
def test_a_confident_policy_hardly_rounds_and_a_floor_by_precision_holds(name, kind):
    floor = max(FLOORS[kind], FLOORS["float32"])
    proof = ServerProof(PROBE)
    proof.check("a", 1, SentScores(BASE), moved(0.9 * floor), name)
    with pytest.raises(WeightSyncError, match=f"at most {floor:.3g} is rounding"):
        ServerProof(PROBE).check("a", 1, SentScores(BASE), moved(1.2 * floor), name)


def test_a_reading_says_how_far_both_sides_moved():
    proof = ServerProof(PROBE)
    proof.check("a", 1, SentScores(BASE), BASE, "float32")
    reading = proof.check("a", 2, SentScores(moved(0.3)), moved(0.3), "float32")
    assert reading.change == pytest.approx(0.3)
    assert reading.server_change == pytest.approx(0.3)


def test_a_server_that_stays_the_same_to_the_last_bit_is_found_out_below_the_limit():
    proof = ServerProof(PROBE)
    proof.check("a", 1, sent(BASE), moved(0.02), "bfloat16")
    with pytest.raises(WeightSyncError, match="kept old weights"):
        proof.check("a", 2, sent(moved(0.05)), moved(0.02), "bfloat16")


def test_weights_that_did_not_change_are_no_alarm():
    proof = ServerProof(PROBE)
    proof.check("a", 1, SentScores(BASE), moved(1e-6), "float32")
    proof.check("a", 2, SentScores(BASE), moved(1e-6), "float32")


def test_a_replaced_server_has_no_history_and_is_asked_thoroughly_again():
    proof = ServerProof(Probe(((1, 2, 3),), thorough=((4, 5),)))
    assert proof.sequences_for("a") == ((1, 2, 3), (4, 5))
    proof.check("a", 1, SentScores(BASE), moved(1e-6), "float32")
    assert proof.sequences_for("a") == ((1, 2, 3),)
    proof.forget("a")
    assert proof.sequences_for("a") == ((1, 2, 3), (4, 5))
    assert proof.check("a", 2, SentScores(BASE), moved(1e-6), "float32").change is None


def test_a_score_that_is_no_number_agrees_with_nothing():
    proof = ServerProof(PROBE)
    nan = [[0.0, float("nan"), -2.0]]
    assert not proof.agrees(SentScores(BASE), nan, "float32")
    with pytest.raises(WeightSyncError):
        proof.check("a", 1, SentScores(BASE), nan, "float32")


def test_an_error_that_begins_at_some_length_is_found_where_it_begins():
    right = long_scores(1, 1024)
    wrong = [[*right[0][:1000], *(x - 1.0 for x in right[0][1000:])]]
    proof = ServerProof(PROBE)
    assert mean_difference(right, wrong) < FACTOR * math.hypot(0.02, 0.02)
    with pytest.raises(WeightSyncError, match="from token 993 of a sequence of 1025 on"):
        proof.check("a", 1, sent(right), wrong, "bfloat16")


def test_what_was_sent_may_differ_from_fp32_masters_by_the_rounding_of_the_wire():
    scores = long_scores(1)
    check_policy(1, sent(scores), noisy(scores, 0.03, 2), "float32")
    # The old rule: three times a baseline that was taken before the first step.
    assert mean_difference(scores, noisy(scores, 0.03, 2)) > 3 * 0.0028


def test_a_policy_that_casts_as_the_wire_does_has_no_rounding_of_weights_to_allow_for():
    limit = FACTOR * math.hypot(0.02, 0.02)
    scores, further = moved(0.0), moved(-limit * 1.01)
    with pytest.raises(WeightSyncError, match="is not what trains"):
        check_policy(1, sent(scores), further, "bfloat16")
    check_policy(1, sent(scores), further, "bfloat16", merged=True)
