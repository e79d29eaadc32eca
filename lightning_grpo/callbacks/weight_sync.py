"""WeightSync: the new weights go to every server after the last step on a rollout batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_grpo._compat_lightning import log_step, log_values
from lightning_grpo.contract import KEEP_BEST, Trained
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError, require_count, require_seconds
from lightning_grpo.loader import Minibatch
from lightning_grpo.types import InterruptionChoice
from lightning_grpo.weights.publisher import PublishReport, SyncSettings
from lightning_grpo.weights.transport import Transport

_FEW = 4
_LOGGED = {"time/weight_sync_s", "time/servers_paused_s", "mismatch/probe", "mismatch/sent"}


class WeightSync(Callback):
    """Publishes the trainer's weights to the inference servers and proves that they arrived.

    `GRPOModule` supplies it unless the trainer has one. It runs on every rank: gathering sharded
    weights is collective, the rest is rank 0's.

    Args:
        transport: How weights travel; None chooses by what is there (CUDA IPC for a server on the
            trainer's own GPU, a process group where one can be formed, else disk).
        bucket_mb: Size of the flat buckets that tensors are sent in, MiB. Each costs a few
            milliseconds; a server needs twice as much free memory for a process group's.
        gather_timeout_s: Deadline of gathering the shards; larger models have 5 s more for each GB.
        request_timeout_s: Deadline of each request to a server; the transfer has 5 s more for each
            GB.
        verify: Whether a probe must agree after each publish. Without it nothing tells whether
            servers took the weights, or whether a step has broken them.
        interruption: What becomes of requests in flight. `abort` takes them back and sends them
            again with what they have, and is exact on every server. `retract` has the server read
            them again: quicker, and exact on the embedded engine and on SGLang from 0.5.19 when
            started with `disable-radix-cache`. `auto` is retract where every server does it
            exactly and no `router_replay` needs what it forgets, else abort. `in_place` keeps the
            old weights' keys and values: quickest, and the logprobs behind an update are then those
            of no version.
        release_memory: Servers give their GPU memory back while the trainer steps, and take it
            again for the next publish: for a shared GPU on which both don't fit. Nothing is
            sampled meanwhile; they must have been started with `enable-memory-saver`.
    """

    def __init__(
        self,
        transport: Transport | None = None,
        bucket_mb: int = 2048,
        gather_timeout_s: float = 60.0,
        request_timeout_s: float = 60.0,
        verify: bool = True,
        interruption: InterruptionChoice = "auto",
        release_memory: bool = False,
    ) -> None:
        require_count("bucket_mb", bucket_mb, most=1 << 20)  # a terabyte
        require_seconds("gather_timeout_s", gather_timeout_s)
        require_seconds("request_timeout_s", request_timeout_s)
        if interruption not in get_args(InterruptionChoice):
            raise ConfigError(
                "interruption",
                f"must be one of {', '.join(get_args(InterruptionChoice))}",
                interruption,
            )
        self._published: dict[str, Tensor] | None = None
        self.settings = SyncSettings(
            transport=transport,
            bucket_bytes=bucket_mb << 20,
            gather_timeout_s=gather_timeout_s,
            request_timeout_s=request_timeout_s,
            verify=verify,
            interruption=interruption,
            release_memory=release_memory,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the data module how weights are to travel, before it starts servers."""
        self._published = None
        trainer.datamodule.session.sync = self.settings  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a policy that disagrees with itself: servers could never agree with it."""
        module: Trained = pl_module  # type: ignore[assignment]
        module.check_passes()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the servers to the trainer's weights (a resumed run's differ from the folder's)."""
        self._publish(trainer, pl_module, trained=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Under `validate`, too, the servers answer with the module's weights."""
        self._publish(trainer, pl_module, trained=False)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same under `test`."""
        self._publish(trainer, pl_module, trained=False)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refuse to validate other weights than the servers answer with."""
        if self._published is None or batch_idx + dataloader_idx > 0:
            return
        now = first_values(dict(pl_module.named_parameters()))
        changed = not same_values(self._published, now)
        if trainer.strategy.reduce_boolean_decision(changed, all=False):
            raise ConfigError(
                "weights must stay as they were published until the next step (servers answer "
                f"held-out prompts with those), and {' or '.join(strangers(trainer, pl_module))} "
                f"has changed them. Remove what swaps them around a validation and {KEEP_BEST}."
            )

    on_test_batch_start = on_validation_batch_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """Make room for the steps on a rollout batch, where that was asked for."""
        if batch.is_first and self.settings.release_memory:
            trainer.datamodule.session.release_memory()  # type: ignore[attr-defined]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Minibatch,
        batch_idx: int,
    ) -> None:
        """Publish after the last minibatch of a rollout batch, before validation and saving."""
        if not batch.is_last:
            return
        started = time.perf_counter()
        try:
            report = self._publish(trainer, pl_module, trained=True)
        except BaseException:
            log_values(pl_module, {}, gone=_LOGGED)
            log_step(trainer)  # its turn would come later, and the curve would have a gap
            raise
        known: dict[str, float | None] = {"time/weight_sync_s": time.perf_counter() - started}
        if report is not None:
            # While no server is left the trainer waits for rollouts, wherever it stands.
            known["time/weight_sync_s"] = time.perf_counter() - started - report.waited_s
            known["time/servers_paused_s"] = report.paused_s
            known["mismatch/probe"] = report.probe_diff
            known["mismatch/sent"] = report.sent_diff
        known = trainer.strategy.broadcast(known)
        logged = {name: value for name, value in known.items() if value is not None}
        log_values(pl_module, logged, gone=_LOGGED - logged.keys())

    def _publish(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *, trained: bool
    ) -> PublishReport | None:
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        module: Trained = pl_module  # type: ignore[assignment]
        report = data.publish(module.sharding_root(), trained=trained)
        # Only code of the user's could change weights between a step and a validation.
        if trained and not trainer.enable_validation:
            self._published = None  # nobody looks before a test, which publishes first
        elif strangers(trainer, pl_module) and (trained or self._published is None):
            self._published = first_values(dict(pl_module.named_parameters()))
        return report


@torch.no_grad()
def first_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the first elements of every tensor, by which other weights are recognized.

    Returns:
        fp32 `[up to 4]`, on the CPU; of sharded tensors this rank's.
    """
    few = {name: _local(tensor).flatten()[:_FEW].float() for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    for device in {value.device for value in few.values()}:  # a wait for each of these
        here = {name: value for name, value in few.items() if value.device == device}
        flat = torch.cat(list(here.values())).cpu()
        sizes = [value.numel() for value in here.values()]
        found.update(zip(here, flat.split(sizes), strict=True))
    return found


def same_values(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two such takes are equal, where both have a value."""
    pairs = ((value, right[name]) for name, value in left.items() if name in right)
    return all(a.equal(b) for a, b in ((a[: len(b)], b[: len(a)]) for a, b in pairs))


def strangers(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    """Names of the classes in a run that neither Lightning nor this package has made."""
    known = ("lightning.", "lightning_grpo.")
    classes = [*map(type, trainer.callbacks), type(pl_module)]  # type: ignore[attr-defined]
    return [each.__name__ for each in classes if not each.__module__.startswith(known)]


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
