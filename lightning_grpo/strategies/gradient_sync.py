"""Whether a backward pass reduces gradients over ranks: for micro-batches of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import lightning as L
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Protocol, runtime_checkable


@runtime_checkable
class KeepsParameters(Protocol):
    """A strategy that says whether full parameters are freed after the forward pass."""

    @property
    def reshard_after_forward(self) -> bool:
        """Free them between forward and backward."""


@contextmanager
def gradient_sync(module: L.LightningModule, enabled: bool) -> Iterator[None]:
    """Run one micro-batch's forward and backward with or without reducing gradients.

    The same call for every strategy: DDP's `no_sync`, FSDP2's flags, nothing on one device. The
    last micro-batch has it enabled; what earlier ones left in the gradients is reduced with it,
    also when its backward runs after the block (Lightning's own).

    Args:
        module: The LightningModule in training.
        enabled: Whether this backward pass reduces.
    """
    wrapped = module.trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        with nullcontext() if enabled else wrapped.no_sync():
            yield
        return
    sharded = [each for each in module.modules() if isinstance(each, FSDPModule)]
    strategy = module.trainer.strategy
    keeps = isinstance(strategy, KeepsParameters) and not strategy.reshard_after_forward
    _set(sharded, enabled, keeps)
    try:
        yield
    finally:
        _set(sharded, True, keeps)


def _set(sharded: Sequence[FSDPModule], enabled: bool, keeps: bool) -> None:
    for each in sharded:
        each.set_requires_gradient_sync(enabled, recurse=False)
        each.set_is_last_backward(enabled)
        if keeps:
            # What stays gathered after the forward pass serves the step's later micro-batches too.
            each.set_reshard_after_backward(enabled, recurse=False)
