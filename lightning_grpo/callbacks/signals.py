"""Signals in training: a flag, a stop that all ranks agree on, and exit codes.

SignalHandling: a signal sets a flag, and the ranks act on it together at a safe point.

Lightning's own handlers act inside the signal: they broadcast (two ranks then wait for each other
for good) or save a checkpoint between any two bytecodes. Ours take their place from
`on_train_start` to the end of the fit; before, and under `validate`, SIGTERM raises (`EarlyStop`).

Exit status, when nothing catches `StopRun`: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1
(rank 0; the other ranks end with 0). A second SIGINT or SIGTERM exits at once, with the same
numbers.

What such a stop saves (`hpc_ckpt_N.ckpt`, beside the run's folder; the `last.ckpt` of a
`ModelCheckpoint` leads there) is to be gone on from: once that was done and a newer checkpoint is
there, it is removed. An error saves as well where it is none of the trainer's: what a wait was for
has failed (servers, rewards, prompts), behind a step that is whole. One that the trainer raises
itself does not: its weights may be what is wrong.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_grpo._compat_lightning import (
    cluster_environment,
    hpc_checkpoint_path,
    launched_processes,
    log_step,
)
from lightning_grpo.callbacks.early_stop import EarlyStop, came_early
from lightning_grpo.contract import OnRollouts
from lightning_grpo.distributed import RankChannel
from lightning_grpo.distributed.channel import ENDING, most_urgent
from lightning_grpo.errors import GRPOError, StopRun
from lightning_grpo.strategies.checkpoints import save_as_last


class StopFlag:
    """Own signal handlers that only set a flag; the second SIGTERM or SIGINT exits at once.

    Python runs a handler when the main thread is back in Python: not while it sits in a collective.
    So the interpreter also writes each signal's number into a socket at once
    (`signal.set_wakeup_fd`), and a thread reads from there.
    """

    def __init__(self) -> None:
        self._came: set[str] = set()
        self._first_at: float | None = None
        self._saved: dict[signal.Signals, Any] = {}
        self._old_wakeup = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def requested(self) -> str:
        """The name of the signal to act on, or an empty string."""
        return most_urgent(tuple(self._came))

    @property
    def age_s(self) -> float | None:
        """Seconds since the first signal; None if there was none."""
        return None if self._first_at is None else time.monotonic() - self._first_at

    @property
    def installed(self) -> bool:
        """Whether the handlers are in place."""
        return self._sockets is not None

    def install(self, names: Iterable[str]) -> None:
        """Take over these signals, with the flag down; only the main thread can."""
        if self.installed or threading.current_thread() is not threading.main_thread():
            return
        self._came, self._first_at = set(), None
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = (reader, writer)
        signals = {signal.Signals[name] for name in names}
        self._thread = threading.Thread(
            target=self._read, args=(reader, signals), name="grpo-signals", daemon=True
        )
        self._thread.start()
        self._old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._saved = {each: signal.signal(each, self._raise_flag) for each in signals}
        for each, before in self._saved.items():
            if came_early(each, before):
                self._raise_flag(each, None)

    def uninstall(self, *, exit_on_signal: bool = False) -> None:
        """Give the signals back to whom they were taken from; idempotent.

        A handler that somebody else has put in place meanwhile is left alone: Lightning gives its
        own back before callbacks are torn down.

        Args:
            exit_on_signal: Leave a handler that exits at once for SIGTERM and SIGINT instead, for
                a shutdown after which Lightning puts the original ones back.
        """
        if self._sockets is None or self._thread is None:
            return
        for each, handler in self._saved.items():
            if signal.getsignal(each) != self._raise_flag:
                continue
            leaving = exit_on_signal and each.name in ENDING
            signal.signal(each, _exit_now if leaving else handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_wakeup)
        reader, writer = self._sockets
        writer.close()
        self._thread.join(timeout=1.0)
        reader.close()
        self._sockets = self._thread = None
        self._saved = {}

    def _raise_flag(self, signum: int, frame: FrameType | None) -> None:
        self._first_at = self._first_at or time.monotonic()
        self._came.add(signal.Signals(signum).name)

    def _read(self, reader: socket.socket, signals: set[signal.Signals]) -> None:
        ending = 0
        while data := reader.recv(64):
            for number in data:
                if number not in signals:
                    continue
                self._raise_flag(number, None)
                ending += signal.Signals(number).name in ENDING
                if ending > 1:
                    _exit_now(number, None)


def _exit_now(signum: int, frame: FrameType | None) -> None:
    """Leave without another word to anyone; the shell's status for that signal."""
    sys.stderr.write(f"second signal ({signal.Signals(signum).name}): exiting at once\n")
    sys.stderr.flush()
    os._exit(128 + signum)


_LOG = logging.getLogger(__name__)
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
FINAL = "final-step="
"""How the name of what `FinalCheckpoint` saves begins."""


def save_for_resume(trainer: L.Trainer) -> str:
    """Save where `ckpt_path="hpc"` finds it, as a requeued Slurm job does by itself; collective."""
    path = trainer.strategy.broadcast(hpc_checkpoint_path(trainer))
    save_as_last(trainer, path)
    return path


def requeue_slurm_job(trainer: L.Trainer) -> None:
    """`scontrol requeue` this job, if it is one and Lightning's `auto_requeue` is left on."""
    environment = _slurm(trainer)
    if environment is None or not environment.auto_requeue:
        return
    job = str(environment.job_id())
    result = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, text=True, check=False
    )
    if result.returncode:
        _LOG.error("`scontrol requeue %s` failed: %s", job, result.stderr.strip())
    else:
        rank_zero_info(f"requeued Slurm job {job}")


class GoesOn(Callback):
    """Has the checkpoint that `last` stood for removed when its turn comes, as the others are.

    Lightning keeps what a run went on from, which somebody may have named. Nobody named this one,
    and each start of a run would leave one more.
    """

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Forget it, once the callbacks that ask for it at the start have."""
        trainer.ckpt_path = None


class SignalHandling(Callback):
    """Ends the run in good order on SIGTERM, SIGINT and SIGUSR1: save, then raise `StopRun`.

    `GRPOModule` supplies it unless the trainer has one. The flag is looked at after the last
    minibatch of a rollout batch and in every stoppable wait of the `RankChannel`; what one rank
    got, all ranks act on. After SIGUSR1 (Slurm's warning before the time limit) a Slurm job is
    requeued too.
    """

    def __init__(self) -> None:
        self.flag = StopFlag()
        self._early = EarlyStop()
        self._channel = RankChannel.single()
        self._save: Callable[[L.Trainer], str] = save_for_resume
        self._requeue: Callable[[L.Trainer], None] = requeue_slurm_job
        self._at_boundary: Callable[[Any], bool] = lambda batch: True
        self._saved_to = ""
        self._first_step = 0
        self._used: set[str] = set()

    def connect(
        self,
        channel: RankChannel,
        *,
        save: Callable[[L.Trainer], str] = save_for_resume,
        at_boundary: Callable[[Any], bool] = lambda batch: True,
        requeue: Callable[[L.Trainer], None] = requeue_slurm_job,
    ) -> None:
        """Wire the callback into a run; before `on_train_start`, on every rank.

        Args:
            channel: How ranks agree; its waits look at this callback's flag from now on.
            save: Saves a checkpoint and returns its path; called on all ranks at the same point.
            at_boundary: Whether a run can resume after this batch of the loader; the same on all
                ranks.
            requeue: Asks for the job to be run again; rank 0 only, after a save for SIGUSR1.
        """
        self._channel = channel
        self._save = save
        self._at_boundary = at_boundary
        self._requeue = requeue
        channel.stop_source = self.poll

    def poll(self) -> str:
        """The name of the signal that this rank got, or an empty string."""
        if self.flag.installed:
            return self.flag.requested
        # Its exception was raised, and came to nothing: the next wait ends the run.
        return "SIGTERM" if came_early(signal.SIGTERM, signal.getsignal(signal.SIGTERM)) else ""

    @property
    def requested(self) -> str | None:
        """The name of the signal that this rank got."""
        return self.flag.requested or None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the ranks of a run on rollouts; until training begins SIGTERM raises."""
        self._early.install()
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, OnRollouts) and data.session is not None:
            self.connect(data.session.channel, at_boundary=lambda batch: batch.is_last)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over from Lightning's handlers, which were registered just before."""
        assert trainer.world_size == self._channel.world_size, "connect() was not called"
        self._saved_to, self._first_step = "", trainer.global_step
        came_from = Path(str(trainer.ckpt_path)).resolve()  # `last` may lead to what a stop saved
        # What they are called, a checkpoint says, which may be a stranger's.
        folders = (came_from.parent, Path(trainer.default_root_dir).resolve())
        self._used = {p for p in self._used if _is_ours(Path(p)) and Path(p).parent in folders}
        self._remove_used(trainer, [came_from])  # whose run may have been killed before it could
        # What is left was saved later, under a number that was free again.
        used = _is_stop(came_from) or (_is_ours(came_from) and not _is_named(trainer))
        self._used = {str(came_from)} if used else set()
        self.flag.install((*_SIGNALS, *_requeue_signal(trainer)))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """At the end of a rollout batch, end the run if any rank was asked to."""
        self._channel.beat("training")
        self._remove_used(trainer, resumable(trainer))
        if not self._at_boundary(batch):
            return
        name = self._channel.agree_on_stop()
        if name:
            log_step(trainer)  # its turn would come later, and the curve would have a gap
            stop = self._channel.stop_run(name, self._stop(trainer, name))
            stop.saved_to = self._saved_to
            raise stop

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save if it came out of a wait; tell the other ranks of what is no stop."""
        try:
            stops = isinstance(exception, StopRun)
            failed = exception is self._channel.failed_wait
            trained = trainer.global_step > self._first_step
            if stops and not self.flag.installed:
                end_with_this_process(launched_processes(trainer).values())
            elif self.flag.installed and not self._saved_to and (stops or (failed and trained)):
                self._save_late(trainer, exception)
            if not stops:
                cause = self._channel.report_failure(exception)
                if cause is not None and cause is not exception:
                    _LOG.error("the cause lies elsewhere: %s", cause)
            if self._saved_to:
                self._remove_used(trainer, [Path(self._saved_to)])
        finally:
            self.flag.uninstall(exit_on_signal=True)
            self._early.uninstall()

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoints of stops this one is the successor of."""
        return {"used": sorted(self._used)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Those that a run had used by then, and may not have lived to remove."""
        self._used = set(state_dict.get("used", ()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._remove_used(trainer, resumable(trainer))
        self.flag.uninstall()
        self._early.uninstall()

    def _remove_used(self, trainer: L.Trainer, newer: Iterable[Path]) -> None:
        """Remove checkpoints beside `ModelCheckpoint`'s that newer ones have taken the place of."""
        if not self._used or not trainer.is_global_zero:
            return
        if _slurm(trainer) is not None:
            # By itself, Lightning goes on from one of these alone, also after a node has failed.
            newer = [path for path in newer if _is_stop(path)]
        newest_s = max((_written_s(path) for path in newer), default=0.0)
        # The `last` of a callback that seldom saves may still lead there.
        needed = {str(path.resolve()) for path in resumable(trainer)}
        # One of another run may have been saved under the same number since.
        for path in [p for p in self._used - needed if _written_s(Path(p)) < newest_s]:
            self._used.remove(path)
            try:
                if Path(path).is_dir():
                    shutil.rmtree(path)
                else:
                    Path(path).unlink(missing_ok=True)
            except OSError as error:
                _LOG.warning("%s was gone on from, and can't be removed: %s", path, error)

    def _save_late(self, trainer: L.Trainer, ending: BaseException) -> None:
        name = type(ending).__name__
        if isinstance(ending, StopRun):
            name = signal.Signals(ending.signal).name
        try:
            told = self._stop(trainer, name)
        except Exception as error:  # noqa: BLE001 - said; servers are still to be ended
            self._channel.report_failure(error)
            told = f"{name}: stopped at step {trainer.global_step}, and {error}"
            _LOG.error("%s", told)
        if isinstance(ending, StopRun):
            ending.args = (told,)
        else:
            ending.add_note(told)
        if isinstance(ending, GRPOError):
            ending.saved_to = self._saved_to

    def _stop(self, trainer: L.Trainer, name: str) -> str:
        self._channel.beat("saving a checkpoint", deadline_s=600.0)
        self._saved_to = self._save(trainer)
        age_s = self.flag.age_s
        after = "" if age_s is None else f" ({age_s:.1f} s after the signal)"
        message = (
            f"{name}: stopped at step {trainer.global_step}, saved {self._saved_to}; "
            f"resume with ckpt_path={self._saved_to!r}{after}"
        )
        rank_zero_info(message)
        requeues = name in ("SIGUSR1", *_requeue_signal(trainer))
        if requeues and self._channel.rank == 0:
            self._requeue(trainer)
        return message


def resumable(trainer: L.Trainer) -> list[Path]:
    """The checkpoints that this run has saved by itself, as far as one can go on from them."""
    found: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if not getattr(callback, "save_weights_only", False):
            state = callback.state_dict()
            found += [state.get(name, "") for name in ("best_model_path", "last_model_path")]
            found += state.get("best_k_models", ())
    return [Path(path) for path in found if path]


def _is_stop(path: Path) -> bool:
    return re.fullmatch(r"hpc_ckpt_\d+\.ckpt", path.name) is not None


def _is_ours(path: Path) -> bool:
    """Whether no `ModelCheckpoint` saved it, which would remove it in its turn."""
    return _is_stop(path) or re.fullmatch(rf"{FINAL}\d+(-v\d+)?\.ckpt", path.name) is not None


def _is_named(trainer: L.Trainer) -> bool:
    """Whether somebody named the checkpoint that the run goes on from, and not `last`."""
    found = any(isinstance(each, GoesOn) for each in trainer.callbacks)  # type: ignore[attr-defined]
    return not (found or Path(str(trainer.ckpt_path)).is_symlink())


def _written_s(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def end_with_this_process(ranks: Iterable[Popen[bytes]]) -> None:
    """End the ranks that this process started when it ends: they would wait for it.

    Not before: Lightning ends this process on the spot when one of them ends with an error.
    """
    for process in ranks:
        atexit.register(process.kill)


def _slurm(trainer: L.Trainer) -> SLURMEnvironment | None:
    environment = cluster_environment(trainer)
    return environment if isinstance(environment, SLURMEnvironment) else None


def _requeue_signal(trainer: L.Trainer) -> tuple[str, ...]:
    environment = _slurm(trainer)
    if environment is None or environment.requeue_signal is None:
        return ()
    return (environment.requeue_signal.name,)
