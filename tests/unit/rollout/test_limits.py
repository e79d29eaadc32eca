from __future__ import annotations

import resource

import psutil
import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.ledger import (
    FILES_PER_SERVER,
    SPARE_FILES,
    RolloutLimits,
    raise_file_limit,
    room_for_connections,
)


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
