"""Signals to a run of two real ranks: what is saved, how everybody ends, and what resumes."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_grpo._compat_lightning import launched_processes
from lightning_grpo.callbacks.signals import SignalHandling, save_for_resume
from lightning_grpo.distributed import RankChannel
from tests.fakes.ranks import run_ranks, start_launcher, start_ranks
from tests.fakes.tiny_lm import Steps, TinyModule, make_trainer


class Connected(Callback):
    """Does what the data module does: brings the channel to the callback."""

    def __init__(self, handling: SignalHandling, loader: Waiting) -> None:
        self.handling = handling
        self.loader = loader
        self.channel = RankChannel.single()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.channel = RankChannel.connect(
            trainer.global_rank, trainer.world_size, host="127.0.0.1", rank_timeout_s=5.0
        )
        self.channel.watch_processes(launched_processes(trainer))
        self.channel.start_watchdog(grace_s=1.0)
        print(f"PID {trainer.global_rank} {os.getpid()}.", flush=True)
        self.loader.channel = self.channel
        self.handling.connect(
            self.channel,
            save=save_for_resume,
            at_boundary=lambda batch: batch % 2 == 1,  # two optimizer steps per rollout batch
            requeue=lambda trainer: print("REQUEUED", flush=True),
        )

    def on_exception(self, trainer, pl_module, exception) -> None:
        print(f"ON_EXCEPTION {type(exception).__name__} {exception}", flush=True)
        self.channel.close(linger_s=5.0)

    def teardown(self, trainer, pl_module, stage) -> None:
        print("TEARDOWN", flush=True)
        self.channel.close()


class Waiting(Steps):
    """Waits for ever before the batch `wait_at`, as a starving run does."""

    def __init__(self, length: int, wait_at: int | None) -> None:
        super().__init__(length)
        self.wait_at = wait_at
        self.channel = RankChannel.single()

    def before_fetch(self, step: int) -> None:
        if step == self.wait_at:
            print("WAITING", flush=True)
            future = Future() if self.channel.rank == 0 else None
            self.channel.wait(future, what="a rollout batch")


class Slow(TinyModule):
    def __init__(self, blocked_at: int | None, pause_s: float) -> None:
        super().__init__()
        self.blocked_at = blocked_at
        self.pause_s = pause_s

    def on_train_batch_start(self, batch, batch_idx) -> None:
        super().on_train_batch_start(batch, batch_idx)
        print(f"STEP {batch}", flush=True)
        time.sleep(self.pause_s)
        if batch == self.blocked_at and self.trainer.global_rank == 0:
            dist.all_reduce(torch.ones(1))  # the other rank never joins
        elif batch == self.blocked_at:
            time.sleep(30)


def train(
    strategy: str,
    folder: str,
    steps: int,
    wait_at: int | None = None,
    blocked_at: int | None = None,
    pause_s: float = 0.0,
    ckpt_path: str | None = None,
) -> list[float]:
    import lightning_grpo.strategies.fsdp2  # noqa: F401 - registers the name

    module = Slow(blocked_at, pause_s)
    handling = SignalHandling()
    loader = Waiting(100, wait_at)
    trainer = make_trainer(
        strategy, folder, 2, max_steps=steps, callbacks=[handling, Connected(handling, loader)]
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module.losses


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_sigterm_to_one_rank_saves_on_all_ends_all_and_resumes(tmp_path, strategy):
    with start_ranks(train, 2, strategy, str(tmp_path), 10**6, None, None, 0.1) as ranks:
        ranks.wait_for("STEP 4", 1)
        ranks.kill(1, signal.SIGTERM)
        zero, one = ranks.join(timeout_s=30)
    assert (zero.returncode, one.returncode) == (143, 0), zero.output + one.output
    (saved,) = tmp_path.iterdir()
    assert saved.name == "hpc_ckpt_1.ckpt"
    assert "ON_EXCEPTION StopRun SIGTERM: stopped at step" in zero.output
    assert "TEARDOWN" not in zero.output  # Lightning calls on_exception instead
    assert "Traceback" not in zero.output
    step = int(zero.output.split("stopped at step ")[1].split(",")[0])
    assert step % 2 == 0
    plain = run_ranks(train, 2, strategy, str(tmp_path), step + 2)[0]
    resumed = run_ranks(train, 2, strategy, str(tmp_path), step + 2, None, None, 0.0, str(saved))[0]
    assert resumed == pytest.approx(plain[step:], abs=1e-6)


def test_ctrl_c_in_a_wait_saves_at_the_last_boundary_and_resumes(tmp_path):
    with start_ranks(train, 2, "ddp", str(tmp_path), 100, 4) as ranks:
        ranks.wait_for("WAITING", 0)
        ranks.wait_for("WAITING", 1)
        for rank in (0, 1):  # a terminal's Ctrl-C reaches every process
            ranks.kill(rank, signal.SIGINT)
        zero, one = ranks.join(timeout_s=30)
    assert (zero.returncode, one.returncode) == (130, 0), zero.output + one.output
    assert "SIGINT: stopped at step 4, saved" in one.output
    plain = run_ranks(train, 2, "ddp", str(tmp_path), 6)[0]
    saved = str(tmp_path / "hpc_ckpt_1.ckpt")
    resumed = run_ranks(train, 2, "ddp", str(tmp_path), 6, None, None, 0.0, saved)[0]
    assert resumed == pytest.approx(plain[4:], abs=1e-6)


def test_usr1_requeues_from_rank_zero_and_a_term_on_its_heels_does_not_cut_the_save(tmp_path):
    with start_ranks(train, 2, "ddp", str(tmp_path), 10**6, None, None, 0.2) as ranks:
        ranks.wait_for("STEP 2", 0)
        ranks.kill(0, signal.SIGUSR1)
        ranks.kill(0, signal.SIGTERM)
        zero, one = ranks.join(timeout_s=30)
    assert (zero.returncode, one.returncode) == (138, 0), zero.output + one.output
    assert zero.output.count("REQUEUED") == 1
    assert "REQUEUED" not in one.output
    assert Path(tmp_path / "hpc_ckpt_1.ckpt").exists()


def test_a_second_signal_ends_a_rank_that_sits_in_a_collective_and_the_other_follows(tmp_path):
    with start_ranks(train, 2, "ddp", str(tmp_path), 10**6, None, 2) as ranks:
        ranks.wait_for("STEP 2", 0)
        ranks.wait_for("STEP 2", 1)
        time.sleep(0.5)
        ranks.kill(0, signal.SIGTERM)
        time.sleep(0.3)
        ranks.kill(0, signal.SIGTERM)
        (zero,) = ranks.join([0], timeout_s=5)
        assert zero.returncode == 143, zero.output
        assert "second signal (SIGTERM)" in zero.output
        (one,) = ranks.join([1], timeout_s=20)
    assert one.returncode == 75
    assert "rank 0 failed" in one.output
    assert not list(tmp_path.iterdir())


def ended(pid: int, timeout_s: float) -> bool:
    """Whether a process that is not our child ends (it may stay as a zombie)."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_sigterm_to_lightnings_own_launcher_ends_its_children_too(tmp_path):
    with start_launcher(train, "ddp", str(tmp_path), 10**6, None, None, 0.1) as ranks:
        ranks.wait_for("STEP 4")
        ranks.kill(0, signal.SIGTERM)
        (zero,) = ranks.join(timeout_s=30)
        assert zero.returncode == 143, zero.output
        child = int(zero.output.split("PID 1 ")[1].split(".")[0])
        assert ended(child, timeout_s=15)
    assert zero.output.count("ON_EXCEPTION StopRun SIGTERM") == 2
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


@pytest.mark.parametrize("place", [pytest.param("wait", marks=pytest.mark.slow), "collective"])
def test_the_end_of_a_launched_rank_is_named_before_lightning_kills_the_launcher(tmp_path, place):
    wait_at, blocked_at = (2, None) if place == "wait" else (None, 2)
    with start_launcher(train, "ddp", str(tmp_path), 100, wait_at, blocked_at) as ranks:
        ranks.wait_for("WAITING" if place == "wait" else "STEP 2")
        time.sleep(0.5)
        child = int(ranks.output(0).split("PID 1 ")[1].split(".")[0])
        os.kill(child, signal.SIGKILL)
        (zero,) = ranks.join(timeout_s=20)
    assert zero.returncode != 0
    assert "rank 1 failed" in zero.output
    assert "its process ended: SIGKILL" in zero.output
