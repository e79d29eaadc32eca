from __future__ import annotations

import json
import resource
from collections import Counter

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.errors import ConfigError, FailureBudgetError, RolloutError
from lightning_grpo.rollout.ledger import (
    FILES_PER_SERVER,
    SPARE_FILES,
    Ledger,
    RolloutLimits,
    raise_file_limit,
    room_for_connections,
)
from lightning_grpo.types import Outcome


def test_a_prompt_ends_once():
    ledger = Ledger([4])
    ledger.record((0, 2), Outcome.FILTERED)
    with pytest.raises(RolloutError, match=r"prompt \(0, 2\) ended twice: filtered, then trained"):
        ledger.record((0, 2), Outcome.TRAINED)


def test_a_pass_that_is_over_shrinks_to_its_counts_and_still_knows_duplicates():
    ledger = Ledger([3])
    for row, outcome in enumerate([Outcome.TRAINED, Outcome.EXPIRED, Outcome.TRAINED]):
        ledger.record((0, row), outcome)
    assert ledger.summary(0) == {
        "trained": 2,
        "filtered": 0,
        "failed": 0,
        "expired": 1,
        "skipped": 0,
    }
    assert ledger.state_dict()["open"] == []
    with pytest.raises(RolloutError, match="ended twice"):
        ledger.record((0, 1), Outcome.TRAINED)
    ledger.record((1, 1), Outcome.TRAINED)


def test_no_rows_and_rows_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="at least one prompt"):
        Ledger([0])
    with pytest.raises(RolloutError, match=r"prompt \(0, 5\) is not one of the 5 rows"):
        Ledger([5]).record((0, 5), Outcome.TRAINED)


def test_when_nothing_ever_works_the_run_ends_at_once_with_the_first_traceback():
    ledger = Ledger([100], batch_size=3, max_failed_fraction=1.0)
    ledger.record((0, 7), Outcome.FAILED, "Traceback: it broke here")
    ledger.record((0, 8), Outcome.FAILED, "another")
    with pytest.raises(
        FailureBudgetError, match=r"first 3 groups all failed.*\(0, 7\).*broke here"
    ):
        ledger.record((0, 9), Outcome.FAILED, "a third")


def test_one_early_failure_is_not_a_rate():
    ledger = Ledger([100], batch_size=4, max_failed_fraction=0.1)
    ledger.record((0, 0), Outcome.FAILED, "boom")
    ledger.record((0, 1), Outcome.TRAINED)


def test_above_the_rate_of_ten_batches_the_run_ends_and_below_it_goes_on():
    ledger = Ledger([1000], batch_size=2, max_failed_fraction=0.1)  # 2 of the last 20
    ledger.record((0, 0), Outcome.TRAINED)
    for row in (1, 2):
        ledger.record((0, row), Outcome.FAILED, f"error of row {row}")
    for row in range(3, 30):  # the two leave the window
        ledger.record((0, row), Outcome.TRAINED)
    for row in (30, 31):
        ledger.record((0, row), Outcome.FAILED, "late")
    with pytest.raises(FailureBudgetError, match=r"3 of the last 20 groups.*error of row 1"):
        ledger.record((0, 32), Outcome.FAILED, "later")


def test_when_everything_fails_from_some_point_on_the_run_ends_whatever_may_fail():
    ledger = Ledger([1000], batch_size=1, max_failed_fraction=1.0)
    ledger.record((0, 0), Outcome.TRAINED)
    for row in range(1, 10):
        ledger.record((0, row), Outcome.FAILED, "boom")
    with pytest.raises(FailureBudgetError, match="10 of the last 10 groups"):
        ledger.record((0, 10), Outcome.FAILED, "boom")


def test_a_run_that_goes_on_from_where_failures_ended_it_has_a_new_budget():
    ledger, again = (Ledger([1000], batch_size=1, max_failed_fraction=0.1) for _ in range(2))
    ledger.record((0, 0), Outcome.TRAINED)
    ledger.record((0, 1), Outcome.FAILED, "boom")
    with pytest.raises(FailureBudgetError):
        ledger.record((0, 2), Outcome.FAILED, "boom")
    again.load_state_dict(ledger.state_dict())
    again.record((0, 3), Outcome.TRAINED)
    again.record((0, 4), Outcome.FAILED, "another")
    with pytest.raises(FailureBudgetError, match="2 of the last 3 groups"):
        again.record((0, 5), Outcome.FAILED, "and one more")


def test_a_prompt_that_was_expired_or_filtered_does_not_count_as_failed():
    ledger = Ledger([1000], batch_size=2, max_failed_fraction=0.0)
    for row in range(50):
        ledger.record((0, row), Outcome.EXPIRED if row % 2 else Outcome.FILTERED)


outcomes = st.lists(st.sampled_from([o for o in Outcome if o is not Outcome.FAILED]), max_size=40)


@given(num_rows=st.integers(1, 7), outcomes=outcomes, cut=st.integers(0, 40))
def test_any_history_cut_by_a_checkpoint_goes_on_as_if_it_were_not(num_rows, outcomes, cut):
    ledger, expected = Ledger([num_rows]), Counter()
    for index, outcome in enumerate(outcomes):
        if index == cut:
            # JSON has no bytes and no integer keys, so only plain data comes back the same.
            plain = json.loads(json.dumps(ledger.state_dict(), default=list))
            ledger = Ledger([num_rows])
            ledger.load_state_dict(plain)
        key = divmod(index, num_rows)
        ledger.record(key, outcome)
        expected[key[0], str(outcome)] += 1
        with pytest.raises(RolloutError):
            ledger.record(key, outcome)
    assert ledger.num_ended == len(outcomes)
    assert ledger.counts == Counter(outcomes)
    for pass_index in {index // num_rows for index in range(len(outcomes))}:
        summary = ledger.summary(pass_index)
        assert all(summary[name] == expected[pass_index, name] for name in summary)


def test_passes_over_each_dataset_end_on_their_own():
    ledger = Ledger([1, 3])
    for pass_index in range(5):
        ledger.record((pass_index, 0), Outcome.TRAINED)
    ledger.record((0, 2), Outcome.FILTERED)
    assert [entry[:2] for entry in ledger.state_dict()["open"]] == [[1, 0]]
    assert ledger.outcome((4, 0)) == "ended"
    assert ledger.outcome((0, 1)) is None
    assert ledger.summary(0)["trained"] == ledger.summary(0)["filtered"] == 1


def test_a_prompt_that_is_skipped_ends_its_pass_and_is_no_success_and_no_failure():
    ledger = Ledger([2], max_failed_fraction=1.0)
    ledger.skip((0, 0))
    ledger.record((0, 1), Outcome.TRAINED, success=0.25)
    assert ledger.outcome((0, 0)) == "ended"
    assert ledger.summary(0)["skipped"] == ledger.num_ended == 1
    assert (ledger.success(0), ledger.success(1)) == (None, 0.25)
    with pytest.raises(RolloutError, match="ended twice"):
        ledger.skip((0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "`max_attempts` must be >= 1, got 0"),
        ({"reward_processes": -1}, "`reward_processes` must be >= 0, got -1"),
        ({"max_filtered_batches": -1}, "`max_filtered_batches` must be >= 0"),
        ({"max_in_flight": 0}, "`max_in_flight` must be >= 1"),
        ({"reward_timeout_s": 0}, "`reward_timeout_s` must be > 0, got 0"),
        ({"straggler_timeout_s": -1.0}, "`straggler_timeout_s` must be > 0"),
        ({"max_failed_fraction": 1.5}, "`max_failed_fraction` must be <= 1, got 1.5"),
        ({"max_server_restarts": -1}, "`max_server_restarts` must be >= 0, got -1"),
        ({"server_timeout_s": 0}, "`server_timeout_s` must be > 0, got 0"),
        ({"straggler_policy": "kill"}, "`straggler_policy` must be 'wait' or 'drop', got 'kill'"),
    ],
)
def test_a_limit_that_can_not_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RolloutLimits(**options)


def test_the_defaults_work():
    assert RolloutLimits().max_attempts == 3
    assert RolloutLimits(straggler_timeout_s=None, max_in_flight=None).reward_timeout_s == 15


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft != resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert raise_file_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        assert raise_file_limit() == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_files_that_suffice_are_not_spoken_of(caplog):
    assert room_for_connections(1000, 16, most_files=20_000) > 1000
    assert not caplog.records


def test_too_few_files_are_used_up_and_named(caplog):
    others = psutil.Process().num_fds() + SPARE_FILES + 2 * FILES_PER_SERVER
    assert room_for_connections(1000, 2, most_files=others + 37) == 37
    (told,) = [record.message for record in caplog.records]
    assert f"`ulimit -n {1000 + others}`" in told
    assert "1000 requests in flight and 2 servers: 37 are sent at once" in told


def test_no_room_for_a_single_connection_is_refused():
    with pytest.raises(ConfigError, match=r"64 files .*`ulimit -n \d+`"):
        room_for_connections(8, 1, most_files=64)
