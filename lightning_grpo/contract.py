"""What a module, a data module and a Trainer must agree on, and how a run describes itself.

Which Trainer settings work with rollouts, checked before anything is started.

Each rule names the setting, what was given and the way out. The rules follow from two facts: one
batch of the loader is one optimizer step, and weights are published after the last step of a
rollout batch, so nothing may stop, save or validate in the middle of one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from lightning_grpo.algorithm.advantages import Truncation
from lightning_grpo.algorithm.batch import RolloutBatch
from lightning_grpo.algorithm.losses import KLPenalty
from lightning_grpo.engine.model import check_servable
from lightning_grpo.errors import MOST, MOST_SAMPLES, ConfigError, require_number
from lightning_grpo.loader import Prepared
from lightning_grpo.policy.packed import largest_chunk
from lightning_grpo.policy.size import ADAPTER_FRACTION, TrainingSetup
from lightning_grpo.servers.base import Servers
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.session.material import RolloutsIn
from lightning_grpo.session.session import Session
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy, row_ranks_of
from lightning_grpo.types import RolloutProgress, Sampling, ServerActivity
from lightning_grpo.validation import EvaluationRecord

MOST_TRAJECTORIES = 1 << 22
"""Of one rollout batch: a hundred gigabytes of bookkeeping, before the first token."""
_BATCH = "it changes what a batch is"
_AVERAGE = "servers answer with the weights that are trained, it validates and saves others"
KEEP_BEST = (
    "keep the best trained weights with `ModelCheckpoint(monitor='eval/avg_at_1', mode='max')`"
)
_MEMORY = "bound memory with `model.max_tokens_per_microbatch`"
_NO_VALIDATION = "For no validation set `trainer.limit_val_batches: 0`."
_REFUSED_CALLBACKS = {
    GradientAccumulationScheduler: (_BATCH, _MEMORY),
    LearningRateFinder: (_BATCH, "set the learning rate of `model.optimizer`"),
    BatchSizeFinder: (_BATCH, _MEMORY),
    WeightAveraging: (_AVERAGE, KEEP_BEST),
    StochasticWeightAveraging: (_AVERAGE, KEEP_BEST),
    ModelPruning: ("servers have no place for its masks", "prune what `export` writes"),
}


class Trained(Protocol):
    """What a data module and WeightSync ask of the module that is trained."""

    model_path: str
    max_tokens_per_microbatch: int
    gradient_checkpointing: bool
    compiles: bool
    router_replay: bool
    lora: object | None
    kl: KLPenalty | None
    truncation: Truncation

    def check_model(self) -> None:
        """Refuse a model that can't be trained, by its config alone."""
        ...

    def check_passes(self) -> None:
        """Refuse a policy that disagrees with itself."""
        ...

    def prepare_rollout(self, batch: RolloutBatch) -> Prepared:
        """Advantages of a whole rollout batch."""
        ...

    def sharding_root(self) -> nn.Module:
        """The policy, as the strategy has wrapped it."""
        ...


@runtime_checkable
class Rolling(Protocol):
    """A data module that knows how far its rollouts are."""

    def progress(self) -> RolloutProgress | None:
        """How far the next rollout batch is."""
        ...


@runtime_checkable
class Served(Protocol):
    """A data module that knows what its servers do."""

    def server_activities(self, *, ongoing: bool = False) -> Sequence[ServerActivity]:
        """What each server has done since the last call."""
        ...


@runtime_checkable
class Asking(Protocol):
    """A loader of held-out prompts that knows how much it asks for."""

    num_answers: int


@runtime_checkable
class Described(Protocol):
    """A module or data module that says what it resolved."""

    def describe(self) -> Mapping[str, str]:
        """Label -> one line."""
        ...


@runtime_checkable
class Evaluated(Protocol):
    """A data module that keeps its validations."""

    evaluations: Sequence[EvaluationRecord]


@runtime_checkable
class OnRollouts(Protocol):
    """A data module whose batches come from a session of rollouts."""

    session: Session | None


@runtime_checkable
class InFolder(Protocol):
    """A data module that knows the run's folder."""

    run_dir: Path | None


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run's files go; called on all ranks, since Lightning broadcasts it."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, InFolder) and data.run_dir is not None:
        return data.run_dir
    return Path(trainer.log_dir or trainer.default_root_dir)


def evaluated_step(trainer: L.Trainer) -> int:
    """Optimizer steps before the validation that has just ended, of a checkpoint's run too."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    evaluations = data.evaluations if isinstance(data, Evaluated) else []
    return evaluations[-1].step if evaluations else trainer.global_step


def logged_numbers(trainer: L.Trainer) -> dict[str, float]:
    """What was logged last, as plain numbers by name."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse Trainer settings that can't work with rollouts, before anything is opened.

    Raises:
        ConfigError: A setting can't work; the message says what to set instead.
    """
    _check_numbers(trainer)
    _check_accumulation(trainer)
    _check_precision(trainer)
    _check_callbacks(trainer)
    settings: Any = trainer  # Lightning sets these in helpers, unseen by type checkers
    if settings.overfit_batches:
        raise ConfigError(
            "trainer.overfit_batches",
            "must be 0 (rollouts are sampled anew)",
            settings.overfit_batches,
            "To train on few prompts set `data.prompts.limit`.",
        )


def check_intervals(trainer: L.Trainer, steps_per_rollout: int, epoch_steps: int) -> None:
    """Refuse what would stop, save or validate in the middle of a rollout batch.

    Args:
        trainer: The trainer about to fit.
        steps_per_rollout: Optimizer steps on one rollout batch.
        epoch_steps: Optimizer steps of a nominal epoch.

    Raises:
        ConfigError: Which setting, and the nearest value that works.
    """
    epoch_steps = _limited(trainer, epoch_steps)
    _check_validation(trainer, epoch_steps)
    if steps_per_rollout > 1:
        for name, steps in _intervals(trainer, epoch_steps):
            _check_interval(name, steps, steps_per_rollout)
        _check_times(trainer)


def _check_numbers(trainer: L.Trainer) -> None:
    """What Lightning takes as it is given, and divides by or compares with later."""
    settings: Any = trainer
    interval = vars(trainer).get("val_check_interval")  # not there where a time is set
    sanity = None if trainer.num_sanity_val_steps == math.inf else trainer.num_sanity_val_steps
    for name, value, above, least, way_out in (
        ("val_check_interval", interval, 0, None, _NO_VALIDATION),
        ("check_val_every_n_epoch", settings.check_val_every_n_epoch, None, 1, _NO_VALIDATION),
        ("gradient_clip_val", trainer.gradient_clip_val, None, 0, "Null is for no clipping."),
        ("log_every_n_steps", settings.log_every_n_steps, None, 0, "1 logs every step."),
        ("num_sanity_val_steps", sanity, None, 0, "0 is for none."),
        ("num_nodes", trainer.num_nodes, None, 1, "1 is this machine alone."),
    ):
        if value is not None and not isinstance(value, bool):
            require_number(
                f"trainer.{name}", value, above=above, least=least, most=math.inf, way_out=way_out
            )


def _check_accumulation(trainer: L.Trainer) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches",
            "must be 1 (one batch is one optimizer step, its micro-batches run inside it)",
            trainer.accumulate_grad_batches,
            "To save memory lower `model.max_tokens_per_microbatch`.",
        )
    settings: Any = trainer
    if settings.reload_dataloaders_every_n_epochs:
        raise ConfigError(
            "trainer.reload_dataloaders_every_n_epochs",
            "must be 0 (the prompt stream never ends)",
            settings.reload_dataloaders_every_n_epochs,
            "Leave it out.",
        )


def _check_precision(trainer: L.Trainer) -> None:
    precision = trainer.precision
    if precision in ("32-true", "32"):
        return
    if precision == "bf16-mixed" and not _is_sharded(trainer):
        return
    raise ConfigError(
        f"`trainer.precision` must be `32-true` (updates of 1e-6 vanish in bf16 weights), got "
        f"`{precision}`. For bf16 compute use `trainer.strategy: fsdp2`, whose `param_dtype` casts "
        "a copy, or `bf16-mixed` on one device or ddp."
    )


def _is_sharded(trainer: L.Trainer) -> bool:
    return isinstance(trainer.strategy, L.pytorch.strategies.ModelParallelStrategy)


def _check_callbacks(trainer: L.Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for refused, (why, instead) in _REFUSED_CALLBACKS.items():
            if isinstance(callback, refused):
                raise ConfigError(
                    f"`trainer.callbacks` must not hold {type(callback).__name__} ({why}). Remove "
                    f"it and {instead}."
                )


def _limited(trainer: L.Trainer, epoch_steps: int) -> int:
    """Steps of an epoch, as the Trainer limits it."""
    limit: Any = trainer.limit_train_batches
    return min(limit, epoch_steps) if isinstance(limit, int) else int(epoch_steps * limit)


def _check_validation(trainer: L.Trainer, epoch_steps: int) -> None:
    """What Lightning would refuse, too, once servers run: it counts an interval in each epoch."""
    interval = vars(trainer).get("val_check_interval")  # not there where a time is set
    settings: Any = trainer
    counted_anew = trainer.check_val_every_n_epoch is not None and settings.limit_val_batches > 0
    if isinstance(interval, int) and interval > epoch_steps and counted_anew:
        raise ConfigError(
            "trainer.val_check_interval",
            f"must be at most {epoch_steps}, the steps of an epoch",
            interval,
            "To count steps across epochs set `trainer.check_val_every_n_epoch: null`; for no "
            "validation `trainer.limit_val_batches: 0`.",
        )


def _intervals(trainer: L.Trainer, epoch_steps: int) -> list[tuple[str, int]]:
    """Every setting that says "after this many optimizer steps"."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return [("trainer.fast_dev_run", trainer.max_steps)]  # it sets all the others
    found: list[tuple[str, int]] = [("trainer.max_steps", trainer.max_steps)]
    limit: Any = trainer.limit_train_batches
    if isinstance(limit, int):
        found.append(("trainer.limit_train_batches", limit))
    elif limit < 1.0:
        found.append(("trainer.limit_train_batches", epoch_steps))
    interval = vars(trainer).get("val_check_interval")  # not there where a time is set
    if isinstance(interval, int) and not isinstance(interval, bool):
        found.append(("trainer.val_check_interval", interval))
    elif isinstance(interval, float) and interval < 1.0:
        found.append(("trainer.val_check_interval", max(1, int(epoch_steps * interval))))
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            # Lightning offers no public reading of this setting.
            found.append(("ModelCheckpoint.every_n_train_steps", callback._every_n_train_steps))
    return [(name, steps) for name, steps in found if steps > 0]


def _check_times(trainer: L.Trainer) -> None:
    """A clock knows nothing of rollout batches."""
    for timer in (c for c in trainer.callbacks if isinstance(c, Timer)):  # type: ignore[attr-defined]
        raise ConfigError(
            "`trainer.max_time` must be null where a rollout batch takes several optimizer steps "
            f"(it would stop and save between them), got {timer.time_remaining()} s. Use "
            "`max_steps`, or send SIGTERM, which stops between two rollout batches."
        )
    if "val_check_interval" not in vars(trainer):
        raise ConfigError(
            "`trainer.val_check_interval` must be a number of steps or a part of an epoch where a "
            "rollout batch takes several optimizer steps (a time would validate between them, with "
            "weights that the servers have not), got a time."
        )
    for callback in trainer.checkpoint_callbacks:
        # Lightning offers no public reading of this setting.
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise ConfigError(
                "ModelCheckpoint.train_time_interval",
                "must be null where a rollout batch takes several optimizer steps (it would save "
                "between them)",
                str(callback._train_time_interval),
                "Use `every_n_train_steps`.",
            )


def _check_interval(name: str, steps: int, steps_per_rollout: int) -> None:
    if steps % steps_per_rollout == 0:
        return
    nearest = max(1, math.floor(steps / steps_per_rollout + 0.5)) * steps_per_rollout
    raise ConfigError(
        f"`{name}` must be a multiple of {steps_per_rollout}, the optimizer steps on one rollout "
        f"batch (`data.minibatches_per_batch` x `data.passes_per_batch`), got {steps} steps, which "
        f"would cut one. The nearest is {nearest}."
    )


def training_setup(
    module: Trained, trainer: L.Trainer, ranks: int, device_type: str
) -> TrainingSetup:
    """How a module is trained, as far as memory and time depend on it.

    Args:
        module: What is trained.
        trainer: Its Trainer, which may have been built on other hardware.
        ranks: How many train.
        device_type: What they train on.
    """
    strategy, kl = trainer.strategy, module.kl
    sharding = strategy if isinstance(strategy, FSDP2Strategy) else None
    in_half = sharding is not None and sharding.dtype_on(device_type) != "float32"
    reference = ""
    if kl is not None and not (module.lora is not None and kl.reference is None):
        reference = "host" if kl.offload else "gpu"
    return TrainingSetup(
        module.max_tokens_per_microbatch,
        ranks=ranks,
        sharded=sharding is not None,
        half=in_half or trainer.precision == "bf16-mixed",
        keeps=sharding is None or not sharding.reshards(ranks),
        checkpointing=module.gradient_checkpointing,
        compiled=module.compiles,
        trained_fraction=ADAPTER_FRACTION if module.lora is not None else 1.0,
        offloaded=sharding is not None and sharding.cpu_offload,
        reference=reference,
        chunk_logits=largest_chunk(torch.device(device_type)),
        shard_size=None if sharding is None else sharding.shard_size,
        row_ranks=row_ranks_of(strategy),
    )


def check_devices(trainer: L.Trainer, servers: Servers | None) -> None:
    """Refuse a Trainer on GPUs some of which serve.

    Args:
        trainer: The trainer about to fit.
        servers: None in a replay.
    """
    if servers is not None and isinstance(trainer.accelerator, CUDAAccelerator):
        check_gpus(trainer.device_ids, servers.planned_devices)


def check_engine(servers: Servers | None, model: str) -> None:
    """Refuse a model that the servers' engine can't run, before a process is started.

    Args:
        servers: None in a replay. SGLang says so itself.
        model: Hub id or folder.
    """
    if isinstance(servers, EmbeddedServers):
        check_servable(model)


def check_gpus(training: Sequence[int], serving: Sequence[int]) -> None:
    """Refuse GPUs that both train and serve, unless all do: then they are shared.

    Args:
        training: GPUs of the Trainer, numbered as torch numbers them.
        serving: GPUs of the servers.
    """
    overlap = sorted(set(training) & set(serving))
    if overlap and set(training) != set(serving):
        free = sorted(set(training) - set(serving))
        raise ConfigError(
            f"`trainer.devices` and `data.servers` must not overlap unless equal, both use GPU "
            f"{overlap}. Set `trainer.devices` to what the servers leave"
            f"{f': {free}' if free else ', or name fewer in `servers.devices`'}."
        )


def check_rollouts_in(given: Any) -> None:
    """Refuse a place of rollouts that there is not."""
    places = get_args(RolloutsIn)
    if given not in places:
        raise ConfigError("rollouts_in", f"must be one of {', '.join(places)}", given)


def check_sizes(
    batch_size: int,
    group_size: int,
    minibatches_per_batch: int,
    passes_per_batch: int,
    max_staleness: int,
) -> None:
    """Refuse sizes of a rollout batch that can't work."""
    for name, value, least, most, why in (
        ("batch_size", batch_size, 1, MOST_TRAJECTORIES, "a batch needs a prompt"),
        ("group_size", group_size, 2, MOST_SAMPLES, "an advantage needs a baseline"),
        ("minibatches_per_batch", minibatches_per_batch, 1, MOST, "a batch takes a step"),
        ("passes_per_batch", passes_per_batch, 1, MOST_SAMPLES, "a batch is trained on once"),
        ("max_staleness", max_staleness, 0, MOST, "0 is exactly on-policy"),
    ):
        require_number(
            name,
            value,
            least=least,
            most=most,
            whole=True,
            why=why,
            way_out=""
            if isinstance(value, int) and value > most
            else f"Set `data.{name}: {least}` or more.",
        )
    if batch_size * group_size > MOST_TRAJECTORIES:
        raise ConfigError(
            f"`batch_size` x `group_size` must be at most {MOST_TRAJECTORIES} (all of a rollout "
            f"batch is held in memory), got {batch_size} x {group_size}."
        )
    if batch_size % minibatches_per_batch:
        raise ConfigError(
            f"`minibatches_per_batch` must divide `batch_size` (groups are not split), got "
            f"{minibatches_per_batch} and {batch_size}."
        )


def check_ranks(num_ranks: int, num_sequences: int, row_ranks: int = 1) -> None:
    """Refuse more ranks than a minibatch has sequences: some would never have work.

    Args:
        num_ranks: Of the Trainer, over all nodes.
        num_sequences: Of one minibatch.
        row_ranks: Ranks that compute each sequence together.
    """
    if num_ranks > num_sequences * row_ranks:
        together = f", {row_ranks} of which compute each sequence together" * (row_ranks > 1)
        raise ConfigError(
            f"`trainer.devices` x `trainer.num_nodes` must be at most the sequences of a minibatch "
            f"(`batch_size` / `minibatches_per_batch` x `group_size` = {num_sequences}), got "
            f"{num_ranks} ranks{together}. Use fewer devices, or raise `data.batch_size`."
        )


def check_callers(trainer: L.Trainer) -> None:
    """Refuse a Trainer without a data module, and `predict`."""
    settings: Any = trainer
    if settings.datamodule is None:
        raise ConfigError(
            "GRPOModule needs the rollouts of a RolloutDataModule. Call "
            "`trainer.fit(module, datamodule=data)`."
        )
    if trainer.state.fn == TrainerFn.PREDICTING:
        raise ConfigError(
            "`trainer.predict` can't be used: completions come from the servers. To score a "
            "model on held-out prompts use `trainer.validate`."
        )


def check_sized(trainer: L.Trainer) -> None:
    """Refuse a training loader without a length."""
    if trainer.num_training_batches == math.inf:
        raise ConfigError(
            "the training loader must have a length, or Lightning fetches a batch before the "
            "step on the one before it. Give it `__len__`, or set "
            "`trainer.limit_train_batches` to a number of steps."
        )


def with_one_optimizer(configure: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A subclass's `configure_optimizers`, refused where it returns several optimizers or none."""

    @functools.wraps(configure)
    def configured(self: Any) -> Any:
        found = configure(self)
        if isinstance(found, list | tuple) or found is None:
            optimizers = found or ()
            if optimizers and isinstance(optimizers[0], list | tuple):
                optimizers = optimizers[0]
            if len(optimizers) != 1:
                raise ConfigError(
                    f"{type(self).__name__}.configure_optimizers",
                    "must return one optimizer (one batch is one optimizer step)",
                    len(optimizers),
                    "Give one optimizer several parameter groups, each with its learning rate.",
                )
        return found

    return configured


def is_fitting(trainer: L.Trainer | None) -> bool:
    """Whether this is training; not under Fabric, `validate` or `test`."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def remaining_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps until `max_steps` or `max_epochs`; None if neither is set.

    From `on_train_start` on. Epochs are counted as Lightning counts them: those behind may have
    been of another length (another `limit_train_batches`, other prompts in a second `fit`).
    """
    ends: list[float] = []
    if trainer.max_steps > 0:
        ends.append(trainer.max_steps - trainer.global_step)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        length = trainer.num_training_batches
        loop: Any = trainer.fit_loop
        epochs = loop.epoch_progress.current
        left = (trainer.max_epochs - epochs.processed) * length
        if epochs.ready > epochs.processed:  # resumed in the middle of one
            left -= min(length, loop.epoch_loop.batch_progress.current.processed)
        ends.append(left)
    nearest = min(ends, default=math.inf)
    return max(0, int(nearest)) if nearest < math.inf else None


def describe_dtypes(trainer: L.Trainer, policy: nn.Module, served: Mapping[str, str]) -> str:
    """Precision everywhere: of weights, compute, gradients and optimizer, then what is `served`."""
    weights = compute = gradients = _dtypes(policy.parameters())
    if isinstance(trainer.strategy, FSDP2Strategy):
        compute, gradients = trainer.strategy.compute_dtype, trainer.strategy.reduce_dtype
    elif trainer.precision == "bf16-mixed":
        compute = "bfloat16 (autocast)"
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    state = {
        "weights": weights,
        "compute": compute,
        "gradients": gradients,
        # Before the first step there is no state; it is made like the parameters.
        "optimizer": _dtypes(parameter for group in groups for parameter in group["params"]),
        **served,
    }
    return ", ".join(f"{name} {dtype}" for name, dtype in state.items())


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return " and ".join(sorted({str(each.dtype).removeprefix("torch.") for each in tensors}))


def describe_sampling(sampling: Sampling) -> str:
    """How completions are sampled; what is off is left out."""
    said = [f"temperature {sampling.temperature:g}"]
    off = {"top_p": 1.0, "top_k": -1, "min_new_tokens": 0, "stop": (), "stop_token_ids": ()}
    said += [f"{name} {vars(sampling)[name]}" for name in off if vars(sampling)[name] != off[name]]
    return ", ".join([*said, f"at most {sampling.max_new_tokens} tokens"])
