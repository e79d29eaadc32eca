"""Signals, and lost ranks, in the whole loop on two ranks with a real server."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.rollout.ledger import RolloutLimits
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.serving.health import process_alive
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from tests.fakes.loops import make_data, make_module, make_prompts, make_trainer, odd_reward
from tests.fakes.ranks import start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


class Marks(Callback):
    """Says where the run is, and is slow there."""

    def __init__(self, place: str) -> None:
        self.place = place

    def say(self, place: str) -> None:
        if place == self.place:
            print(f"AT {place}", flush=True)
            time.sleep(1.0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            print("SERVERS", [h.pid for h in trainer.datamodule.servers.handles], flush=True)
        if trainer.global_step == 2:
            self.say("step")

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.global_step == 2:
            self.say("validation")

    def on_validation_end(self, trainer, pl_module) -> None:
        print("VALIDATED", flush=True)


class MarkedSync(WeightSync):
    """Says that a weight sync begins."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def on_train_batch_end(self, trainer, *arguments) -> None:
        if trainer.global_step == 2:
            self.marks.say("sync")
        super().on_train_batch_end(trainer, *arguments)


def train(place: str, url: str, model: str, folder: str) -> None:
    calls = iter(range(10**9))

    def reward(completion: str) -> float:
        if place == "wait" and next(calls) > 12:  # two rollout batches of four, and some
            print("AT wait", flush=True)
            time.sleep(1.0)
            raise RuntimeError("no answer for a while")
        return odd_reward(completion)

    marks = Marks(place)
    data = make_data(
        url or EmbeddedServers(),
        reward,
        limits=RolloutLimits(
            reward_processes=0, rank_timeout_s=10.0, max_attempts=10**6, max_failed_fraction=1.0
        ),
        val_prompts=make_prompts(4),
    )
    trainer = make_trainer(
        Path(folder),
        devices=2,
        strategy=FSDP2Strategy(),
        max_steps=10**6,
        min_steps=10**6 if place in ("wait", "sync") else None,
        val_check_interval=2,
        callbacks=[marks, MarkedSync(marks)],
    )
    trainer.fit(make_module(model), data)


def saved_step(folder: Path) -> tuple[int, int]:
    """Optimizer steps of the checkpoint, and the version that its rollouts stand at."""
    state = torch.load(folder / "hpc_ckpt_1.ckpt" / "meta.pt", weights_only=True)
    return state["global_step"], state["RolloutDataModule"]["version"]


@pytest.mark.parametrize("place", ["wait", "step", "sync", "validation"])
@pytest.mark.parametrize(
    ("name", "ranks_hit", "code"),
    [("SIGINT", (0, 1), 130), ("SIGTERM", (1,), 143), ("SIGUSR1", (0,), 138)],
)
def test_a_signal_anywhere_saves_the_last_boundary_and_ends_both_ranks(
    tiny_model, server, tmp_path, place, name, ranks_hit, code
):
    with start_ranks(train, 2, place, server, str(tiny_model), str(tmp_path)) as ranks:
        ranks.wait_for(f"AT {place}", timeout_s=100)
        validated = ranks.output(0).count("VALIDATED")
        for rank in ranks_hit:
            ranks.kill(rank, signal.Signals[name])
        zero, one = ranks.join(timeout_s=60)
    assert (zero.returncode, one.returncode) == (code, 0), zero.output + one.output
    step, version = saved_step(tmp_path)
    assert step == version >= 2
    assert "Traceback" not in zero.output + one.output
    if 0 in ranks_hit:
        took_s = float(re.search(r"\(([\d.]+) s after the signal\)", zero.output)[1])
        assert took_s < 30
        print(f"{place}, {name}: saved after {took_s} s")
    assert zero.output.count("VALIDATED") == validated  # none on the way out


@pytest.mark.parametrize("place", ["wait", "step"])
@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_lost_rank_is_named_the_other_ends_and_no_server_stays(
    tiny_model, tmp_path, place, culprit, name
):
    with start_ranks(train, 2, place, "", str(tiny_model), str(tmp_path)) as ranks:
        ranks.wait_for(f"AT {place}", timeout_s=100)
        os.kill(ranks.processes[culprit].pid, signal.Signals[name])
        (other,) = ranks.join([1 - culprit], timeout_s=120)
        pids = [int(n) for n in re.findall(r"SERVERS \[(\d+)\]", ranks.output(0))]
    assert other.returncode not in (None, 0), other.output
    assert f"rank {culprit} failed" in other.output
    assert len(pids) == 1
    _, left = psutil.wait_procs([psutil.Process(p) for p in pids if process_alive(p)], timeout=30)
    assert not left
