"""The order of the loop, by its own event log, on the real engine."""

from __future__ import annotations

import csv
import itertools
import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_grpo.algorithm.advantages import Truncation
from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.rollout.producer import has_variance
from lightning_grpo.types import NO_VERSION, Sampling
from tests.fakes.loops import (
    Events,
    Recorder,
    make_data,
    make_module,
    make_prompts,
    make_trainer,
    odd_reward,
)


def run(trainer, module, data):
    """Fit with an event log and a recorder."""
    data.on_event, recorder = Events(), Recorder()
    trainer.callbacks.append(recorder)
    trainer.fit(module, data)
    return data.on_event, recorder


def test_on_policy_every_fetch_and_request_comes_after_the_sync_before_it_across_epochs(
    tiny_model, server, tmp_path
):
    trainer = make_trainer(tmp_path, max_steps=8)  # an epoch has six
    events, recorder = run(trainer, make_module(tiny_model), make_data(server, max_staleness=0))
    assert trainer.current_epoch >= 1
    syncs = takes = 0
    for name, seen in events.log:
        if name == "sync":
            assert seen["version"] == syncs
            syncs += 1
        elif name == "fetch":
            assert (seen["version"], syncs) == (takes, takes + 1)
        elif name == "take":
            takes += 1
        elif name == "admit" and seen["version"]:  # the first wait for the first sync
            assert syncs == takes + 1
    assert takes == 8
    assert [b.rollout.version for b in recorder.batches] == list(range(8))
    for batch in recorder.batches:
        versions = {v for g in batch.rollout.groups for t in g.trajectories for v in t.versions}
        assert versions == {NO_VERSION, batch.rollout.version}


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_no_consumed_group_is_older_than_the_limit_with_filters_and_failures(
    tiny_model, server, tmp_path, max_staleness
):
    calls = itertools.count(1)

    def reward(completion: str) -> float:
        if next(calls) % 13 == 0:
            raise ValueError("now and then")
        return odd_reward(completion)

    data = make_data(
        server,
        reward,
        prompts=make_prompts(40),
        max_staleness=max_staleness,
        keep_group=has_variance,
        batch_size=4,
    )
    events, recorder = run(make_trainer(tmp_path, max_steps=10), make_module(tiny_model), data)
    oldest = [
        b.rollout.version - min(g.oldest_version for g in b.rollout.groups)
        for b in recorder.batches
    ]
    assert all(0 <= age <= max_staleness for age in oldest)
    assert max(oldest) > 0, "nothing was ever stale: the limit was not put to the test"
    assert events.of("filtered")
    assert events.of("retry")
    kept = [g for b in recorder.batches for g in b.rollout.groups if has_variance(g)]
    assert len(kept) > 30  # of 40; the rest fill batches once the filter's allowance is used up
    for group in kept:
        assert group.oldest_version >= group.admitted_version


def test_the_trained_prompts_are_the_admitted_ones_whatever_their_answers_take(
    tiny_model, server, tmp_path
):

    data = make_data(
        server,
        prompts=make_prompts(24),
        max_staleness=2,
        batch_size=4,
        sampling=Sampling(max_new_tokens=24, stop=("a", "e")),  # lengths differ
    )
    events, recorder = run(make_trainer(tmp_path, max_steps=6), make_module(tiny_model), data)
    admitted = [seen["key"] for seen in events.of("admit")]
    taken = [key for seen in events.of("take") for key in seen["keys"]]
    trained = [g.prompt.key for b in recorder.batches for g in b.rollout.groups]
    assert trained == taken
    assert len(admitted) == len(set(admitted)) == 24
    assert sorted(trained) == sorted(admitted)  # none is left over, none came in their place
    lengths = {t.num_response_tokens for b in recorder.batches for g in b.rollout.groups
               for t in g.trajectories}  # fmt: skip
    assert len(lengths) > 3


class ScoringPasses(Callback):
    """Counts the policy's passes that no step needs, once training has begun."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.count = 0
        pl_module.policy.register_forward_pre_hook(self._pass)

    def _pass(self, *_: object) -> None:
        self.count += not torch.is_grad_enabled()


@pytest.mark.parametrize("verify", [True, False])
def test_without_a_proof_weights_are_published_and_the_trainer_scores_nothing(
    tiny_model, server, tmp_path, verify
):
    passes, sync = ScoringPasses(), WeightSync(verify=verify)
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[passes, sync])
    events, recorder = run(trainer, make_module(tiny_model), make_data(server))
    assert [seen["version"] for seen in events.of("sync")] == [0, 1, 2, 3]
    trajectories = [t for b in recorder.batches for g in b.rollout.groups for t in g.trajectories]
    assert {v for t in trajectories for v in t.versions} == {NO_VERSION, 0, 1, 2}
    assert bool(passes.count) == verify
    assert ("mismatch/probe" in recorder.metrics[-1]) == verify


def test_weights_that_changed_are_seen_by_the_servers_and_the_probe_tells_them_apart(
    tiny_model, server, tmp_path
):
    answers = itertools.count()

    def alternating(completion: str) -> float:
        return float(next(answers) % 2)  # each group has something to learn

    trainer, module = make_trainer(tmp_path, max_steps=4), make_module(tiny_model)
    data = make_data(server, alternating)
    _, recorder = run(trainer, module, data)
    # The recorder's turn comes before WeightSync's: each reading is the step before's.
    agreed = [m["mismatch/probe"] for m in recorder.metrics[1:]]
    assert max(agreed) < 1e-4
    assert data.session.report.probe_diff < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    # Sampled by the version that trains on them: what the trainer scores is what was sampled.
    assert max(m["mismatch/abs_logprob_diff"] for m in recorder.metrics) < 1e-5


def test_minibatches_and_passes_publish_once_per_rollout_batch(tiny_model, server, tmp_path):
    data = make_data(server, batch_size=4, minibatches_per_batch=2, passes_per_batch=2)
    trainer = make_trainer(tmp_path, max_steps=8)
    events, recorder = run(trainer, make_module(tiny_model), data)
    assert [seen["version"] for seen in events.of("sync")] == [0, 1, 2]
    assert [b.index for b in recorder.batches] == [0, 1] * 4
    assert [b.is_last for b in recorder.batches] == [False, False, False, True] * 2
    assert recorder.steps == list(range(1, 9))


def test_a_step_says_what_it_did_and_where_its_time_went(tiny_model, server, tmp_path):
    data = make_data(server, max_staleness=1)
    _, recorder = run(make_trainer(tmp_path, max_steps=3), make_module(tiny_model), data)
    expected = """
        reward/mean reward/std reward/zero_variance_fraction reward/odd_reward/mean
        completion/length_mean completion/length_max completion/truncated_fraction
        staleness/mean staleness/max staleness/dropped_groups staleness/dropped_tokens
        ratio/mean ratio/max ratio/clip_fraction_low ratio/clip_fraction_high
        mismatch/abs_logprob_diff mismatch/k3 policy/loss policy/entropy policy/grad_norm
        rollout/pass rollout/groups_per_s rollout/tokens_per_s rollout/filtered rollout/failed
        rollout/retried rollout/in_flight rollout/queued
        time/step_s time/wait_rollout_s time/forward_backward_s time/optimizer_s time/weight_sync_s
        time/servers_paused_s throughput/tokens_per_s idle/trainer_fraction
        health/event_loop_lag_s health/rss_gb
    """
    names = re.findall(r"\S+", expected)
    assert not set(names) - set().union(*recorder.metrics)  # not every step measures every one


class EqualFrom:
    """A reward that differs within groups of the first rows, and nowhere else."""

    def __init__(self, row: int):
        self._row, self._calls = row, itertools.count()

    def __call__(self, completion: str, answer: str) -> float:
        differs = int(answer) < 2 * self._row
        return float(next(self._calls) % 2) if differs else 1.0


def test_a_batch_whose_rewards_are_all_equal_has_empty_cells_and_no_numbers_of_another(
    tiny_model, server, tmp_path
):
    # Two prompts a batch: the first batch has something to learn, the two behind it have nothing.
    data = make_data(server, reward=EqualFrom(2), prompts=make_prompts(shuffle=False))
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    trainer = make_trainer(tmp_path, max_steps=3, logger=logger)
    run(trainer, make_module(tiny_model), data)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    assert [float(row["reward/zero_variance_fraction"]) for row in rows] == [0.0, 1.0, 1.0]
    for name in ("policy/entropy", "ratio/mean", "mismatch/abs_logprob_diff"):
        assert [bool(row[name]) for row in rows] == [True, False, False], name
        assert name not in trainer.callback_metrics
    assert [float(row["policy/grad_norm"]) for row in rows][1:] == [0.0, 0.0]


def test_truncated_completions_can_be_left_out_and_near_ones_lose_reward(
    tiny_model, server, tmp_path
):
    truncation = Truncation("mask", penalty_buffer=6)
    trainer = make_trainer(tmp_path, max_steps=2)
    data = make_data(server, batch_size=4, sampling=Sampling(max_new_tokens=6))
    _, recorder = run(trainer, make_module(tiny_model, truncation=truncation), data)
    for minibatch, logged in zip(recorder.batches, recorder.metrics, strict=True):
        batch, (counted,) = minibatch.rollout.batch, minibatch.rollout.denominators
        finished = ~batch.truncated
        assert set(batch.length_limits.tolist()) == {6}
        assert counted.tokens == int(batch.loss_lengths[finished].sum())
        assert counted.sequences == int(finished.sum())
        penalty = float((batch.response_lengths / 6).mean())
        assert logged["reward/shaped_mean"] == pytest.approx(logged["reward/mean"] - penalty)


def test_a_run_begins_with_the_precision_of_everything(tiny_model, server, tmp_path, capsys):
    make_trainer(tmp_path, max_steps=1).fit(make_module(tiny_model), make_data(server))
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("dtypes")]
    asked = ("weights", "compute", "gradients", "optimizer", "wire", "server")
    assert line.split(maxsplit=1)[1] == ", ".join(f"{name} float32" for name in asked)
