"""Callbacks that record a run: trajectories, a timeline, checkpoints, sample tables, step times."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import time
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_grpo._compat_lightning import last_saved_step, log_values
from lightning_grpo.callbacks.curve import (
    CurveKeeper,
    going_on_without,
    mlflow_name,
    prepare_loggers,
)
from lightning_grpo.callbacks.health import HealthMonitor
from lightning_grpo.callbacks.screen import GRPOProgress, RunSummary
from lightning_grpo.callbacks.signals import FINAL, SignalHandling
from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.contract import (
    Described,
    Evaluated,
    OnRollouts,
    Served,
    evaluated_step,
    logged_numbers,
    run_folder,
)
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import StopRun, require_count
from lightning_grpo.loader import WAITED, Minibatch, policy_logprobs
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.rollout.records import write_groups
from lightning_grpo.strategies.checkpoints import free_path, save_as_last
from lightning_grpo.strategies.fsdp2 import row_ranks_of
from lightning_grpo.types import Group

log = logging.getLogger(__name__)

FOLDER = "trajectories"
HELD_OUT = "held_out"


class TrajectoryWriter(Callback):
    """Writes every consumed rollout batch to `trajectories/step_000012.parquet` of the run.

    Held-out answers go to `trajectories/held_out/step_000012.parquet`, all sets in one file. Read
    either with `lightning-grpo show`, train from the former with `lightning-grpo replay`. A file
    that can't be written (a full disk) is left out, and the run goes on. Files are written beside
    the training, and are there before the checkpoint that follows them.

    Args:
        folder: Where to write; None is the run's folder (the first logger's).
        every_n_batches: Write every n-th rollout batch only.
    """

    def __init__(self, folder: str | None = None, every_n_batches: int = 1) -> None:
        require_count("every_n_batches", every_n_batches)
        self._folder = folder
        self._every_n_batches = every_n_batches
        self._run_folder = Path()
        self._failed = False
        self._writing: Future[None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder: on all ranks, since Lightning broadcasts it."""
        self._run_folder = Path(self._folder or run_folder(trainer) / FOLDER)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Write the rollout batch after its last optimizer step."""
        rollout = batch.rollout
        if not batch.is_last or rollout.index % self._every_n_batches:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        mine = policy_logprobs(rollout)
        # All ranks are here; a data module of the user's may have no session.
        session = data.session if isinstance(data, OnRollouts) else None
        shares = session.gather(mine) if session is not None else [mine]
        if rollout.groups is None or shares is None:
            return
        path = self._run_folder / f"step_{trainer.global_step:06d}.parquet"
        about: dict[str, Any] = {"step": trainer.global_step, "version": rollout.version}
        advantages = rollout.advantages
        if len(advantages) == sum(len(group.trajectories) for group in rollout.groups):
            about["advantages"] = advantages.tolist()  # else there is one per token
        about["policy_logprobs"] = dict(ChainMap(*shares))
        self._finish()
        thread = ThreadPoolExecutor(1, "trajectories")
        self._writing = thread.submit(self._write, path, rollout.groups, **about)
        thread.shutdown(wait=False)  # ends with the file

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the held-out answers of the validation that has just ended (rank 0 has them)."""
        self._finish()
        data = trainer.datamodule  # type: ignore[attr-defined]
        last = data.evaluations[-1:] if isinstance(data, Evaluated) else []
        for record in last:
            groups = [group for answered in record.groups.values() for group in answered]
            if groups:
                path = self._run_folder / HELD_OUT / f"step_{record.step:06d}.parquet"
                version = max(group.oldest_version for group in groups)
                self._write(path, groups, step=record.step, version=version, outcome="held out")

    def _write(self, path: Path, groups: Sequence[Group], **about: Any) -> None:
        """Write a file, or say why not: once, until one is written again."""
        try:
            write_groups(path, groups, **about)
        except OSError as error:
            if not self._failed:
                why = error.strerror or error
                log.warning("%s can't be written (%s): the run goes on without it", path, why)
            self._failed = True
            return
        if self._failed:
            log.warning("trajectories are written again, from %s on", path)
        self._failed = False

    on_test_end = on_validation_end

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See to it that a run which goes on from here misses no file."""
        self._finish()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for the last file."""
        self._finish()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Wait for the last file; what ends the run is told, whatever became of that."""
        if self._writing is not None:
            wait([self._writing])
            self._writing = None

    def _finish(self) -> None:
        """Wait for the file that is being written; its failure is the run's."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


TIMELINE = "timeline.jsonl"
_PACKAGES = ("lightning-grpo", "torch", "lightning", "transformers", "datasets")


class TimelineWriter(Callback):
    """Records what trainer and servers did when, in `timeline.jsonl` of the run.

    Each line is a JSON object, whose `kind` is `start` (what was resolved, versions, machine),
    `span` (a stretch of time on a `lane`), `line` (a warning of the run) or `end` (how it ended).
    `at` is wall-clock time and `s` a duration, both in seconds; `step` counts as the screen does. A
    resumed run appends: where it repeats a step that a killed run had taken, the later lines count.
    """

    def __init__(self) -> None:
        self._path: Path | None = None  # none: what runs is no training
        self._records: deque[dict[str, Any]] = deque()  # warnings come from any thread
        self._failed = self._began = False
        self._step = 0
        self._part_began = 0.0
        self._sync_began: float | None = None
        self._validated_at = 0.0
        self._listener = _Listener(self._hear)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder, and hear what the package warns of."""
        folder = run_folder(trainer)  # on all ranks, since Lightning broadcasts it
        self._path = folder / TIMELINE if stage == TrainerFn.FITTING else None
        self._failed = not trainer.is_global_zero
        self._step = trainer.global_step
        if self._path is not None:
            logging.getLogger("lightning_grpo").addHandler(self._listener)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record what was resolved."""
        self._step = trainer.global_step
        described: dict[str, str] = {}
        for part in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
            if isinstance(part, Described):
                described |= part.describe()
        self._record("start", described=described, versions=_versions(), machine=_machine())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """Record the wait for a rollout batch."""
        self._end_sync(trainer)
        self._began, self._part_began = True, (now := time.time())
        self._step = trainer.global_step + 1
        if batch.is_first:
            # A validation may lie between the wait for servers and that for the batch.
            began = max(now - batch.rollout.metrics[WAITED], self._validated_at)
            self._span("waiting", began, now)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Record the passes. On a GPU, `StepTimer` has just waited for them."""
        self._end_part("forward and backward")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Record the optimizer's step; `WeightSync` has its turn after this callback."""
        self._end_part("optimizer")
        self._sync_began = self._part_began if batch.is_last else None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when."""
        if self._path is not None:
            self._end_sync(trainer)
            self._began, self._part_began = True, time.time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the validation."""
        if self._path is not None:
            self._step = evaluated_step(trainer)
            self._end_part("validation")
            self._validated_at = self._part_began
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the end."""
        self._end(trainer, "done", "")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Record what ended the run; one that was refused leaves nothing behind."""
        if self._began:
            stopped = isinstance(exception, StopRun | KeyboardInterrupt)
            text = str(exception) or type(exception).__name__
            self._end(trainer, "stopped" if stopped else "failed", text)
        self.teardown(trainer, pl_module, "fit")  # which Lightning leaves out then

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen no more."""
        logging.getLogger("lightning_grpo").removeHandler(self._listener)

    def _end_sync(self, trainer: L.Trainer) -> None:
        """Record the weight sync, which has logged how long it took, and write the step."""
        began, self._sync_began = self._sync_began, None
        if began is not None:
            broken_off_s = time.time() - began
            took_s = logged_numbers(trainer).get("time/weight_sync_s", broken_off_s)
            self._span("weight sync", began, began + took_s)
            self._write(trainer)

    def _end_part(self, what: str) -> None:
        began, self._part_began = self._part_began, time.time()
        self._span(what, began, self._part_began)

    def _end(self, trainer: L.Trainer, how: str, text: str) -> None:
        self._end_sync(trainer)
        self._record("end", how=how, text=text)
        self._write(trainer, ongoing=True)

    def _span(self, what: str, began: float, ended: float) -> None:
        self._record("span", at=began, s=ended - began, lane="trainer", what=what)

    def _hear(self, record: logging.LogRecord) -> None:
        level, text = record.levelname, record.getMessage()
        self._record("line", at=record.created, level=level, text=text)

    def _record(self, kind: str, **fields: Any) -> None:
        if not self._failed:
            self._records.append({"kind": kind, "at": time.time(), "step": self._step, **fields})

    def _write(self, trainer: L.Trainer, *, ongoing: bool = False) -> None:
        """Append what was recorded, or say once why not; at the end with what servers still do."""
        if self._failed or self._path is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        for done in data.server_activities(ongoing=ongoing) if isinstance(data, Served) else ():
            lane = f"server {done.slot}"
            self._record("span", at=done.began_at, s=done.seconds, lane=lane, what=done.what)
        records = [self._records.popleft() for _ in range(len(self._records))]
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in records)
        try:
            with self._path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            self._failed = True
            why = error.strerror or error
            log.warning("%s can't be written (%s): the run goes on without it", self._path, why)


class _Listener(logging.Handler):
    """Passes warnings on, and leaves them on the screen.

    Python shows a warning by itself only where no handler takes it, and one that listens would be
    such a handler.
    """

    def __init__(self, hear: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a warning on; one that is malformed is no fault of who listens."""
        try:
            self._hear(record)
        except Exception:  # noqa: BLE001 - as every handler of the standard library
            self.handleError(record)
        if logging.lastResort is not None and not self._is_shown(record):
            logging.lastResort.handle(record)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _versions() -> dict[str, str]:
    """Versions of Python and of what a run depends on most; a bare checkout has none itself."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _machine() -> str:
    """The machine that rank 0 runs on, in one line."""
    count = torch.cuda.device_count()
    gpus = f"{count} x {torch.cuda.get_device_name(0)}, " if count else ""
    memory = psutil.virtual_memory().total / 2**30
    return f"{gpus}{psutil.cpu_count()} CPU cores, {memory:.0f} GiB"


class FinalCheckpoint(Callback):
    """Saves at the end of training what no `ModelCheckpoint` has saved.

    With validation inside an epoch Lightning saves after validations alone, so that the steps
    after the last one would be lost. It does nothing where the trainer has no checkpoints. What it
    saved `SignalHandling` removes once a run has gone on from there as its `last`.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save beside the other checkpoints, unless one has this step already."""
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if not kept or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(last_saved_step(callback) == trainer.global_step for callback in kept):
            return
        folder = Path(kept[0].dirpath or trainer.default_root_dir)
        path = trainer.strategy.broadcast(free_path(folder, f"{FINAL}{trainer.global_step}"))
        save_as_last(trainer, path)
        if kept[0].monitor is None:
            # Without a metric the newest is the one to go on with.
            kept[0].best_model_path = path


class StepZeroValidation(Callback):
    """Runs the validation loop once before the first optimizer step of a new run.

    It takes the place of Lightning's sanity check, which logs nothing. Resumed runs skip it.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate at step 0, after the servers have the weights."""
        unwanted = not trainer.enable_validation or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.global_step > 0 or unwanted:
            return
        trainer.validating = True
        pl_module.on_validation_model_zero_grad()
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


# -- answers as tables -----------------------------------------------------------------------------

COLUMNS = ("prompt", "completion", "reward", "truncated")
Row = tuple[str, str, float, bool]


class SampleTables(Callback):
    """Logs answers to held-out prompts, the same prompts each time, and some sampled in training.

    A logger with `log_table` (W&B) gets a table, one whose experiment has `add_text` (TensorBoard)
    or `log_text` (MLflow) gets text. Others get nothing.

    Args:
        rows: Answers each time.
        every_n_batches: Log sampled answers of every n-th rollout batch.
    """

    def __init__(self, rows: int = 10, every_n_batches: int = 20) -> None:
        require_count("rows", rows)
        require_count("every_n_batches", every_n_batches)
        self.rows = rows
        self.every_n_batches = every_n_batches

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Log what was sampled, one answer of each of the first groups."""
        rollout = batch.rollout
        due = batch.is_last and rollout.index % self.every_n_batches == 0
        if due and rollout.groups is not None:
            self._log(trainer, "sampled", rollout.groups, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log answers of the validation that has just ended (rank 0 has them)."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        for record in data.evaluations[-1:] if isinstance(data, Evaluated) else ():
            for name, groups in record.groups.items():
                key = f"held_out/{name}" if name else "held_out"
                self._log(trainer, key, groups, record.step)

    on_test_end = on_validation_end

    def _log(self, trainer: L.Trainer, key: str, groups: Sequence[Group], step: int) -> None:
        rows = [row_of(group) for group in groups[: self.rows]]
        for logger in trainer.loggers if rows else ():
            with going_on_without(f"answers in {type(logger).__name__}"):
                send(logger, key, rows, step)


def row_of(group: Group) -> Row:
    """The first answer to a prompt."""
    first = group.trajectories[0]
    return group.prompt.text, first.transcript or first.text, first.reward, first.truncated


def send(logger: Any, key: str, rows: Sequence[Row], step: int) -> None:
    """Give a logger answers in a form that it takes, if there is one."""
    if hasattr(logger, "log_table"):
        logger.log_table(key, columns=list(COLUMNS), data=[list(row) for row in rows], step=step)
        return
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):
        experiment.add_text(key, "\n\n".join(as_markdown(rows)), step)
    elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):
        text = "\n\n".join(as_markdown(rows))
        experiment.log_text(logger.run_id, text, f"{mlflow_name(key)}/step_{step:06d}.md")


def as_markdown(rows: Iterable[Row]) -> Iterable[str]:
    """A heading and the text of each; indented, so that markup in it shows as it is."""
    for prompt, completion, reward, truncated in rows:
        yield f"**reward {reward:g}**" + (", cut off" if truncated else "")
        yield "\n".join(f"    {line}" for line in (prompt + completion).splitlines())


# -- where a step's time goes ----------------------------------------------------------------------


Mark = float | torch.cuda.Event


class StepTimer(Callback):
    """Logs `time/...`, `throughput/...`, `idle/...` and `health/...` of each step.

    The period of a step runs from the end of the step before to its own end, without validation;
    so it holds the weight sync of the step before. On a GPU, which still works on the optimizer
    then, `time/optimizer_s` is that of the step before: to wait for it would cost the next step its
    head start.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find this process."""
        self._process = psutil.Process()
        # The module itself is moved to its device only later.
        device = trainer.strategy.root_device
        self._peak = matrix_peak(device) if stage == "fit" else None
        self._period_started: float | None = None
        self._optimizer: tuple[Mark, Mark] | None = None
        self._validation_s = self._validation_started = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on."""
        if trainer.state.fn == "fit":
            self._validation_s += time.perf_counter() - self._validation_started

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """The batch is there; the first period begins with the wait for it."""
        self._step_started = self._gradients_ready = self._mark()
        if self._period_started is None:
            # The start of the servers and the baseline are no part of a step.
            waited = batch.rollout.metrics[WAITED]
            self._period_started, self._validation_s = time.perf_counter() - waited, 0.0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """The gradients are there, or will be when the GPU comes to it."""
        self._gradients_ready = self._mark()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Log the period that ends here."""
        assert self._period_started is not None
        now, optimizer = time.perf_counter(), (self._gradients_ready, self._mark())
        if self._optimizer is None or self._peak is None:  # else that of the step before
            self._optimizer = optimizer
        period = now - self._period_started - self._validation_s
        logged = {
            "time/step_s": period,
            "time/forward_backward_s": seconds(self._step_started, self._gradients_ready),
            "time/optimizer_s": seconds(*self._optimizer),
            "health/rss_gb": self._process.memory_info().rss / 2**30,
        }
        if batch.is_first:
            waited = batch.rollout.metrics[WAITED]
            logged["idle/trainer_fraction"] = min(1.0, waited / period)
        tokens = int(batch.rollout.denominators[batch.index].tokens)
        logged["throughput/tokens_per_s"] = tokens / period
        if self._peak is not None:
            flops = self._flops(pl_module, batch) / row_ranks_of(trainer.strategy)
            logged["throughput/mfu"] = flops / period / self._peak
            logged["health/gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        logged |= data.health()
        log_values(pl_module, logged)
        self._period_started, self._validation_s, self._optimizer = now, 0.0, optimizer

    def _mark(self) -> Mark:
        """This moment; on a GPU the one at which it will have done what it was given so far."""
        if self._peak is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _flops(self, module: L.LightningModule, batch: Minibatch) -> float:
        rollout = batch.rollout
        rows = [row for part in rollout.plans[batch.index] for row in part]
        share = replace(rollout.sequences, routes=None).select(rows)
        policy: PackedPolicy = module.sharding_root()  # type: ignore[operator]
        return policy.flops(share.lengths.tolist(), int(share.loss_mask.sum()))


def seconds(start: Mark, end: Mark) -> float:
    """From one mark to another; waits for the GPU to come to the second."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start


def matrix_peak(device: torch.device) -> float | None:
    """FLOP/s of a product of two bf16 matrices of 8,192 rows on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    rows, times = 8192, 10
    left, right = (torch.randn(rows, rows, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        left @ right
    end.record()
    end.synchronize()
    del left, right
    torch.cuda.empty_cache()  # servers that start beside look at what is free
    return times * 2 * rows**3 / (begin.elapsed_time(end) / 1e3)


# -- what every run is given -----------------------------------------------------------------------

DEFAULT_CALLBACKS: tuple[type[Callback], ...] = (
    CurveKeeper,
    StepTimer,
    TimelineWriter,  # after StepTimer, which waits for the GPU; before WeightSync
    # Before the run may end behind a batch, which counts as trained on.
    TrajectoryWriter,
    SampleTables,
    # Before the hooks that take long: until it has taken over, signals reach Lightning's handlers.
    SignalHandling,
    WeightSync,
    RunSummary,
    StepZeroValidation,
    HealthMonitor,
    FinalCheckpoint,
    GRPOProgress,
)


def missing_callbacks(trainer: L.Trainer) -> list[Callback]:
    """One of each kind that the trainer has none of; no lines where its progress bar is off."""
    prepare_loggers(trainer)  # in time: no callback has a hook before Lightning's loggers write
    present = tuple(type(c) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return [
        kind()
        for kind in DEFAULT_CALLBACKS
        if not any(issubclass(p, kind) for p in present)
        and not (kind is GRPOProgress and trainer.progress_bar_callback is None)
    ]
