"""What may go wrong while a run goes on, and how it goes on or ends."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.errors import (
    ConfigError,
    FailureBudgetError,
    RolloutError,
    ServersLostError,
    WeightSyncError,
)
from lightning_grpo.module import GRPOModule
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.weights.process_group import ProcessGroupTransport
from tests.fakes.forked_servers import ForkedServers
from tests.fakes.loops import (
    Events,
    Recorder,
    make_data,
    make_module,
    make_prompts,
    make_trainer,
    odd_reward,
)
from tests.fakes.wire import wire_to


def goes_on(tiny_model, data, folder, trainer, error) -> None:
    """What the error saved is whole: a run goes on from there, behind the last step."""
    steps, recorder = trainer.global_step, Recorder()
    assert f"stopped at step {steps}, saved {error.saved_to}" in error.__notes__[-1]
    again = make_trainer(folder, max_steps=steps + 2, callbacks=[recorder])
    again.fit(make_module(tiny_model), data, ckpt_path=error.saved_to)
    assert recorder.steps == [steps + 1, steps + 2]


def rewards_of(recorder):
    return {t.reward for b in recorder.batches for g in b.rollout.groups for t in g.trajectories}


def test_a_reward_that_raises_or_returns_nan_now_and_then_is_tried_again_and_never_zero(
    tiny_model, server, tmp_path
):
    calls = itertools.count(1)

    def reward(completion: str) -> float:
        number = next(calls)
        if number % 11 == 0:
            raise ValueError("a bad day")
        return float("nan") if number % 13 == 0 else 1.0

    data, recorder = make_data(server, reward, prompts=make_prompts(40), batch_size=4), Recorder()
    data.on_event = events = Events()
    trainer = make_trainer(tmp_path, max_steps=8, callbacks=[recorder])
    trainer.fit(make_module(tiny_model), data)
    assert rewards_of(recorder) == {1.0}
    retried = sum(m["rollout/retried"] for m in recorder.metrics)
    assert 0 < retried <= len(events.of("retry"))
    assert trainer.global_step == 8


def test_a_reward_that_hangs_is_killed_and_the_group_tried_again(tiny_model, server, tmp_path):
    from tests.fakes.reward_processes import hangs_on_some

    limits = RolloutLimits(reward_processes=2, reward_timeout_s=0.5, max_failed_fraction=1.0)
    data = make_data(server, hangs_on_some, limits=limits, batch_size=4)
    data.on_event, recorder = Events(), Recorder()
    make_trainer(tmp_path, max_steps=2, callbacks=[recorder]).fit(make_module(tiny_model), data)
    assert rewards_of(recorder) == {1.0}
    assert data.on_event.of("retry")


def test_a_reward_that_raises_for_all_answers_ends_the_run_with_its_line(
    tiny_model, server, tmp_path
):
    def reward(completion: str) -> float:
        if not completion:
            return 0.0  # so that its trial at the start finds nothing
        raise ZeroDivisionError("the dataset is empty")

    with pytest.raises(FailureBudgetError) as ended:
        make_trainer(tmp_path).fit(make_module(tiny_model), make_data(server, reward))
    message = str(ended.value)
    assert "groups all failed; nothing has worked yet" in message
    assert 'raise ZeroDivisionError("the dataset is empty")' in message
    assert "ZeroDivisionError: the dataset is empty" in message
    assert not list(tmp_path.rglob("*.ckpt"))  # nothing was trained yet


def test_a_failed_run_can_be_fitted_again(tiny_model, server, tmp_path):
    broken = [True]

    def reward(completion: str) -> float:
        if broken and completion:
            raise ZeroDivisionError
        return 1.0

    data, module = make_data(server, reward), make_module(tiny_model)
    with pytest.raises(FailureBudgetError):
        make_trainer(tmp_path).fit(module, data)
    broken.clear()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    assert trainer.global_step == 2


class Forgetful(WeightSync):
    """A subclass that forgets `super()`."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        pass


class Bare(GRPOModule):
    """A subclass that forgets it too."""

    def configure_callbacks(self):
        return []


@pytest.mark.parametrize(
    ("cls", "callbacks", "error", "message"),
    [
        (GRPOModule, [Forgetful()], RolloutError, r"last 2 rollout batches were not published.*1"),
        (Bare, [], ConfigError, r"must be published before the first rollout batch\. Keep WeightS"),
    ],
)
def test_weights_that_nobody_publishes_end_the_run_that_would_wait_for_ever(
    tiny_model, server, tmp_path, cls, callbacks, error, message
):
    trainer = make_trainer(tmp_path, max_steps=9, callbacks=callbacks)
    with pytest.raises(error, match=message):
        trainer.fit(make_module(tiny_model, cls), make_data(server, max_staleness=1))


class Undefined(GRPOModule):
    """A loss that divides by nothing."""

    def token_loss(self, policy_logprobs, batch):
        loss, metrics = super().token_loss(policy_logprobs, batch)
        return loss * float("nan"), metrics


def test_weights_that_a_step_has_broken_are_no_fault_of_the_servers(tiny_model, server, tmp_path):
    with pytest.raises(WeightSyncError, match=r"logprobs are not finite: .*`policy/grad_norm`"):
        make_trainer(tmp_path).fit(make_module(tiny_model, Undefined), make_data(server))
    assert not list(tmp_path.rglob("*.ckpt"))


class Killer(Callback):
    """Kills the engine after some steps; slows the run down so that it is noticed in it."""

    def __init__(self, data, after: tuple[int, ...], signum=signal.SIGKILL) -> None:
        self.data = data
        self.after = after
        self.signal = signum
        self.pids: list[int] = []
        self.killed_at = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step in self.after:
            handle = self.data.servers.handles[0]
            self.pids.append(handle.pid)
            os.kill(handle.pid, self.signal)
            self.killed_at = time.monotonic()


@pytest.mark.timeout(400)
def test_a_killed_engine_is_started_again_with_the_current_weights_until_it_dies_too_often(
    tiny_model, server, tmp_path
):
    limits = RolloutLimits(reward_processes=0, max_server_restarts=2)
    data = make_data(ForkedServers(), prompts=make_prompts(40), max_staleness=1, limits=limits)
    killer, recorder = Killer(data, after=(2, 5, 8)), Recorder()
    trainer = make_trainer(tmp_path, max_steps=30, callbacks=[killer, recorder])
    with pytest.raises(ServersLostError) as ended:
        trainer.fit(make_module(tiny_model), data)
    message = str(ended.value)
    assert re.search(
        r"Server http://127\.0\.0\.1:\d+ is lost: it failed 3 times within 60 s of service, or "
        r"without an answer in between \(its process \d+ is gone[;)]",
        message,
    )
    assert "0 of 1 servers are left" in message
    assert "`--ckpt_path last`" in message
    assert len(set(killer.pids)) == 3
    assert trainer.global_step >= 8
    data = make_data(server, prompts=make_prompts(40))
    goes_on(tiny_model, data, tmp_path, trainer, ended.value)
    # The trainer stood in a weight sync, and waited for the server.
    waits, syncs = (recorder.of(f"time/{name}_s") for name in ("wait_rollout", "weight_sync"))
    assert max(waits) > max(syncs)
    # Between two deaths the servers held the trainer's weights.
    assert max(recorder.of("mismatch/probe")) < 1e-4


def test_a_reward_that_fails_from_some_step_on_ends_the_run_behind_that_step(
    tiny_model, server, tmp_path
):
    good = iter(range(12))

    def reward(completion: str) -> float:
        if completion and next(good, None) is None:
            raise ZeroDivisionError("the judge is gone")
        return odd_reward(completion)

    trainer = make_trainer(tmp_path, max_steps=40)
    with pytest.raises(FailureBudgetError) as ended:
        trainer.fit(make_module(tiny_model), make_data(server, reward))
    goes_on(tiny_model, make_data(server), tmp_path, trainer, ended.value)


class Cutter(Callback):
    """Cuts the wire to a server in a step, an update or a validation, and mends it 3 s later."""

    def __init__(self, wire, quietly: bool) -> None:
        self.wire, self.quietly = wire, quietly
        self.timers: list[threading.Timer] = []

    def cut(self) -> None:
        self.wire.cut(quietly=self.quietly)
        self.timers.append(threading.Timer(3.0, self.wire.mend))
        self.timers[-1].start()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            self.cut()

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 3 and self.wire.num_cuts == 1:
            self.cut()  # before the weights of this step are published

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, i=0) -> None:
        if trainer.global_step == 4:
            self.cut()


@pytest.mark.slow
@pytest.mark.parametrize("quietly", [False, True])
def test_a_server_that_is_cut_off_for_seconds_costs_no_prompt(
    tiny_model, server, tmp_path, caplog, quietly
):
    steps, batch = 6, 4
    with wire_to(server) as wire:
        data = make_data(
            wire.url,
            prompts=make_prompts(steps * batch),
            val_prompts=make_prompts(4),
            batch_size=batch,
        )
        cutter, recorder = Cutter(wire, quietly), Recorder()
        sync = WeightSync(ProcessGroupTransport("gloo", timeout_s=4.0))
        trainer = make_trainer(
            tmp_path, max_steps=steps, val_check_interval=2, callbacks=[sync, cutter, recorder]
        )
        trainer.fit(make_module(tiny_model), data)
        for timer in cutter.timers:
            timer.join()
    assert wire.num_cuts == 3
    assert data.session.state_dict()["producer"]["ledger"]["counts"] == {"trained": steps * batch}
    assert sum(m["rollout/retried"] for m in recorder.metrics) == 0
    assert max(recorder.of("mismatch/probe")) < 1e-4
    if not quietly:
        out = [r.message for r in caplog.records if "is out, and" in r.message]
        back = [r.message for r in caplog.records if "is back" in r.message]
        assert len(out) == len(back) == 3


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_one_of_two_engines_that_is_killed_or_stopped_costs_no_prompt(tiny_model, tmp_path, signum):
    steps, batch = 12, 4
    data = make_data(
        EmbeddedServers(num_servers=2),
        prompts=make_prompts(steps * batch),
        batch_size=batch,
        max_staleness=1,
    )
    killer, recorder = Killer(data, after=(3,), signum=signum), Recorder()
    trainer = make_trainer(tmp_path, max_steps=steps, callbacks=[killer, recorder])
    trainer.fit(make_module(tiny_model), data)
    assert len(killer.pids) == 1
    ledger = data.session.state_dict()["producer"]["ledger"]["counts"]
    assert ledger == {"trained": steps * batch}
    rows = [g.prompt.row for b in recorder.batches for g in b.rollout.groups]
    assert sorted(rows) == list(range(steps * batch))
    assert max(recorder.of("mismatch/probe")) < 1e-4
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-4
