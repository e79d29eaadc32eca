from __future__ import annotations

import logging

import pytest

from lightning_grpo.callbacks.health import (
    ENOUGH,
    GROUPS,
    MORE,
    RULES,
    WAITING,
    HealthMonitor,
    fill,
    servers_advised,
)
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import RolloutProgress
from tests.fakes.tiny_run import TinyData, TinyModule

HEALTHY = {
    "reward/mean": 0.4,
    "reward/std": 0.3,
    "reward/zero_variance_fraction": 0.2,
    "policy/loss": -0.01,
    "policy/grad_norm": 0.5,
    "completion/truncated_fraction": 0.1,
    "completion/length_mean": 40.0,
    "rollout/filtered": 2.0,
    GROUPS: 16.0,
    "time/step_s": 2.0,
    "time/wait_rollout_s": 0.4,
    "mismatch/abs_logprob_diff": 0.02,
    "correction/dropped_fraction": 0.01,
    "health/event_loop_lag_s": 0.001,
}

SICK = {
    "constant reward": {"reward/std": 0.0, "reward/mean": 0.0},
    "no variance within groups": {"reward/zero_variance_fraction": 0.95},
    "zero loss": {"policy/loss": 0.0, "policy/grad_norm": 0.0},
    "all truncated": {"completion/truncated_fraction": 1.0, "completion/length_mean": 56.0},
    "most groups filtered": {"rollout/filtered": 40.0},
    "waiting for rollouts": {"time/wait_rollout_s": 1.9},
    "too many servers": {ENOUGH: 3.0, "idle/server_fraction": 0.4, "rollout/servers": 5.0},
    "too few servers": {MORE: 2.0, WAITING: 0.55, "rollout/servers": 2.0},
    "mismatch": {"mismatch/abs_logprob_diff": 0.3},
    "correction drops tokens": {"correction/dropped_fraction": 0.7},
    "event loop is late": {"health/event_loop_lag_s": 3.0},
}


def monitor_for(name):
    return HealthMonitor(rules=[rule for rule in RULES if rule.name == name])


def test_every_rule_has_a_case_here():
    assert {rule.name for rule in RULES} == set(SICK)


def test_a_healthy_run_is_left_alone():
    monitor = HealthMonitor()
    assert [monitor.observe(HEALTHY) for _ in range(8)] == [[]] * 8


@pytest.mark.parametrize("name", SICK)
def test_a_fault_is_said_once_and_again_only_after_it_cleared(name):
    rule = next(rule for rule in RULES if rule.name == name)
    monitor = monitor_for(name)
    sick = {**HEALTHY, **SICK[name]}
    assert monitor.observe(HEALTHY) == []
    said = [monitor.observe(sick) for _ in range(rule.batches + 2)]
    assert [len(lines) for lines in said] == [0] * (rule.batches - 1) + [1, 0, 0]
    assert monitor.observe(HEALTHY) == []
    said_again = [monitor.observe(sick) for _ in range(rule.batches)]
    assert len(said_again[-1]) == 1


@pytest.mark.parametrize("name", SICK)
def test_a_sentence_is_one_line_with_its_numbers_filled_in(name):
    rule = next(rule for rule in RULES if rule.name == name)
    monitor = monitor_for(name)
    monitor.observe(HEALTHY)
    said = [monitor.observe({**HEALTHY, **SICK[name]}) for _ in range(rule.batches)]
    (sentence,) = said[-1]
    assert "\n" not in sentence
    assert "nan" not in sentence.split()
    assert "{" not in sentence


def test_a_metric_that_is_not_logged_accuses_nobody():
    monitor = HealthMonitor()
    assert [monitor.observe({"reward/mean": 0.0}) for _ in range(8)] == [[]] * 8


def test_the_mismatch_is_held_against_what_the_last_proof_saw_too():
    monitor = monitor_for("mismatch")
    assert monitor.observe({"mismatch/abs_logprob_diff": 0.0045}) == []
    proved = {"mismatch/abs_logprob_diff": 0.018, "mismatch/probe": 0.041}
    assert monitor.observe(proved) == []
    assert monitor.observe({**proved, "mismatch/abs_logprob_diff": 0.13}) != []


def test_the_mismatch_is_held_against_the_start_of_the_run():
    monitor = monitor_for("mismatch")
    assert monitor.observe({"mismatch/abs_logprob_diff": 0.2}) == []
    assert monitor.observe({"mismatch/abs_logprob_diff": 0.5}) == []
    (sentence,) = monitor.observe({"mismatch/abs_logprob_diff": 0.7})
    assert "0.7" in sentence
    assert "0.2" in sentence


class Waiting(TinyData):
    def progress(self):
        return RolloutProgress(0, 4, 0, 0, "last errors: RewardError: no judge")


@pytest.mark.parametrize(
    ("servers", "idle", "waits", "steps", "advised"),
    [
        (5, 0.40, 0.02, 1, {ENOUGH: 3}),
        (5, 0.99, 0.0, 1, {ENOUGH: 1}),
        (2, 0.40, 0.02, 1, {}),  # both are needed for what they do
        (1, 0.80, 0.0, 1, {}),
        (2, 0.02, 0.55, 1, {MORE: 2, WAITING: 0.55}),
        (4, 0.0, 0.30, 1, {MORE: 2, WAITING: 0.3}),
        (3, 0.0, 1.0, 1, {MORE: 3, WAITING: 1.0}),  # at most as many again
        (2, 0.0, 0.55, 4, {}),  # of the first of four steps, so a quarter of the batch's time
        (4, 0.5, 0.5, 1, {}),  # in turn
        (4, 0.1, 0.1, 1, {}),
    ],
)
def test_how_many_servers_would_do_follows_from_who_waits_for_whom(
    servers, idle, waits, steps, advised
):
    names = ("rollout/servers", "idle/server_fraction", "idle/trainer_fraction")
    metrics = dict(zip(names, (servers, idle, waits), strict=True))
    assert servers_advised(metrics, steps) == pytest.approx(advised)
    assert servers_advised({"rollout/servers": 5.0}) == {}


def test_a_starving_run_is_said_once_until_a_batch_arrives():
    monitor = HealthMonitor(starving_after_s=60)
    assert monitor.starving(now_s=59.0, data=Waiting()) is None
    assert monitor.starving(now_s=61.0, data=Waiting()) == (
        "no rollout batch for 61 s (last errors: RewardError: no judge). Look at "
        "the servers' logs, at `reward_timeout_s`, and at `keep_group` if one is set."
    )
    assert monitor.starving(now_s=90.0) is None
    monitor.observe(HEALTHY)
    assert monitor.starving(now_s=61.0) is not None


def test_a_number_that_is_missing_reads_as_nan():
    assert fill("it is {a/b:.1f}", {}) == "it is nan"


def test_a_time_of_zero_is_refused():
    with pytest.raises(ConfigError, match="`starving_after_s` must be > 0, got 0"):
        HealthMonitor(starving_after_s=0)


def test_a_run_with_a_constant_reward_says_so_in_its_log(make_trainer, caplog):
    module = TinyModule({"reward/mean": 0.0, "reward/std": 0.0})
    trainer = make_trainer(callbacks=[HealthMonitor()], enable_progress_bar=False)
    with caplog.at_level(logging.WARNING, logger="lightning_grpo"):
        trainer.fit(module, datamodule=TinyData(num_rollouts=5))
    said = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_grpo")]
    assert len(said) == 1
    assert said[0].startswith("every completion of the last 3 rollout batches got the same reward")


def test_a_run_that_starves_says_so_while_it_waits(make_trainer, caplog):
    class SlowModule(TinyModule):
        def training_step(self, batch, batch_idx):
            # Waits as a run without rollouts would, until the line was said.
            assert spoken.wait(30)
            return super().training_step(batch, batch_idx)

    import threading

    spoken, said = threading.Event(), []

    class Listener(logging.Handler):
        def emit(self, record):
            if "no rollout batch" in record.getMessage():
                said.append(record.getMessage())
                spoken.set()

    logger = logging.getLogger("lightning_grpo.callbacks.health")
    listener = Listener()
    logger.addHandler(listener)
    try:
        monitor = HealthMonitor(starving_after_s=0.05)
        trainer = make_trainer(callbacks=[monitor], enable_progress_bar=False)
        trainer.fit(SlowModule(), datamodule=Waiting(num_rollouts=1))
    finally:
        logger.removeHandler(listener)
    assert "(last errors: RewardError: no judge)" in said[0]
