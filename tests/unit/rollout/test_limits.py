from __future__ import annotations

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.limits import RolloutLimits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "`max_attempts` must be >= 1, got 0"),
        ({"reward_processes": -1}, "`reward_processes` must be >= 0, got -1"),
        ({"max_filtered_batches": -1}, "`max_filtered_batches` must be >= 0"),
        ({"max_in_flight": 0}, "`max_in_flight` must be >= 1, or null"),
        ({"reward_timeout_s": 0}, "`reward_timeout_s` must be > 0 seconds, got 0"),
        ({"straggler_timeout_s": -1.0}, "`straggler_timeout_s` must be > 0 seconds"),
        ({"max_failed_fraction": 1.5}, "`max_failed_fraction` must be between 0 and 1, got 1.5"),
        ({"straggler_policy": "kill"}, "`straggler_policy` must be 'wait' or 'drop', got 'kill'"),
    ],
)
def test_a_limit_that_can_not_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RolloutLimits(**options)


def test_the_defaults_work():
    assert RolloutLimits().max_attempts == 3
    assert RolloutLimits(straggler_timeout_s=None, max_in_flight=None).reward_timeout_s == 15
