"""The whole loop on two ranks: what may take long, and what ends both, naming the culprit."""

from __future__ import annotations

import ctypes
import re
import threading
from pathlib import Path

import anyio
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.weights.transport import DiskTransport
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer, odd_reward
from tests.fakes.ranks import RankResult, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RANK_TIMEOUT_S = 5.0
LONG_S = 3 * RANK_TIMEOUT_S


class SlowTransport(DiskTransport):
    """The second version takes its time."""

    async def send(self, target, label, timeout_s) -> None:
        if label.endswith(":2"):
            await anyio.sleep(LONG_S)
        await super().send(target, label, timeout_s)


def take_long(model: str, folder: str) -> list[dict[str, float]]:
    calls = iter(range(10**9))

    async def reward(completion: str) -> float:
        if next(calls) == 12:  # of the fourth batch of four
            await anyio.sleep(LONG_S)
        return odd_reward(completion)

    limits = RolloutLimits(reward_timeout_s=10 * LONG_S, rank_timeout_s=RANK_TIMEOUT_S)
    recorder = Recorder()
    trainer = make_trainer(
        Path(folder),
        devices=2,
        strategy="ddp",
        max_steps=5,
        callbacks=[WeightSync(SlowTransport()), recorder],
    )
    trainer.fit(make_module(model), make_data(EmbeddedServers(), reward, limits=limits))
    return recorder.metrics


def test_a_rollout_and_a_weight_sync_of_three_rank_timeouts_pass(tiny_model, tmp_path):
    with start_ranks(take_long, 2, str(tiny_model), str(tmp_path)) as ranks:
        zero, one = ranks.join(timeout_s=200)
    assert (zero.returncode, one.returncode) == (0, 0), zero.output + one.output
    for result in (zero, one):
        assert len(result.value) == 5
        assert max(m["time/wait_rollout_s"] for m in result.value) > LONG_S - 1
        assert max(m["time/weight_sync_s"] for m in result.value) > LONG_S - 1


class KillTheLoop(Callback):
    """Ends the thread of the event loop from outside, whatever it is doing."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            print("SERVERS", [h.pid for h in trainer.datamodule.servers.handles], flush=True)
        if trainer.global_step == 2 and trainer.is_global_zero:
            (loop,) = trainer.datamodule.loop_threads
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(loop), ctypes.py_object(SystemExit)
            )


def fail(what: str, model: str, folder: str) -> None:
    takes = iter(range(10**9))

    def told(name: str, **data: object) -> None:
        if name == "admit":
            data_module.loop_threads.add(threading.get_ident())
        if name == "take" and what == "take" and next(takes) == 2:
            raise LookupError("the queue is corrupt")

    async def reward(completion: str) -> float:
        if what == "exit" and next(takes) > 8:
            raise SystemExit("a reward that leaves")
        return odd_reward(completion)

    limits = RolloutLimits(reward_processes=0, rank_timeout_s=RANK_TIMEOUT_S)
    data_module = make_data(EmbeddedServers(), reward, limits=limits, max_staleness=1)
    data_module.loop_threads = set()
    data_module.on_event = told
    callbacks = [KillTheLoop() if what == "loop" else Servers()]
    trainer = make_trainer(
        Path(folder), devices=2, strategy="ddp", max_steps=10**6, callbacks=callbacks
    )
    trainer.fit(make_module(model), data_module)


class Servers(KillTheLoop):
    """Says only which servers there are."""

    def on_train_batch_start(self, trainer, *arguments) -> None:
        if trainer.global_step == 0:
            super().on_train_batch_start(trainer, *arguments)


def ended(what: str, model: str, folder: str) -> list[RankResult]:
    """Both ranks' ends, within two minutes; no server stays."""
    with start_ranks(fail, 2, what, model, folder) as ranks:
        ranks.wait_for("SERVERS", timeout_s=100)
        results = ranks.join(timeout_s=120)
    for result in results:
        assert result.returncode not in (None, 0), result.output
    (pid,) = re.findall(r"SERVERS \[(\d+)\]", results[0].output)
    assert not psutil.pid_exists(int(pid))
    return results


def test_an_exception_in_take_ends_both_ranks_with_rank_zero_s_traceback(tiny_model, tmp_path):
    zero, one = ended("take", str(tiny_model), str(tmp_path))
    assert "LookupError: the queue is corrupt" in zero.output
    assert "rank 0 failed" in one.output
    assert 'raise LookupError("the queue is corrupt")' in one.output
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("what", ["loop", "exit"])
def test_a_killed_event_loop_ends_both_ranks(tiny_model, tmp_path, what):
    zero, one = ended(what, str(tiny_model), str(tmp_path))
    assert "the rollouts' event loop was ended from outside" in zero.output
    assert "rank 0 failed" in one.output
