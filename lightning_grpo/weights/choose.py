"""Which transport, where the user named none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lightning_grpo.weights.disk import DiskTransport
from lightning_grpo.weights.ipc import IPCTransport
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.transport import Transport


class Located(Protocol):
    """A server with the GPUs that it uses."""

    @property
    def devices(self) -> tuple[int, ...]:
        """GPUs; empty where unknown or none."""
        ...


class Started(Protocol):
    """Servers that answer."""

    @property
    def handles(self) -> Sequence[Located]:
        """One for each server."""
        ...


def choose_transport(
    given: Transport | None, servers: Started, trainer_gpu: int | None, *, on_cpu: bool = False
) -> Transport:
    """The given transport, else one by what is there.

    Where either side computes on CPUs a gloo group. On GPUs an NCCL group, unless a server is on
    the trainer's own GPU, since NCCL refuses two ranks on one device: if that is the only one the
    server maps the trainer's memory, else weights go by disk.

    Args:
        given: The user's choice.
        servers: Started.
        trainer_gpu: Rank 0's, numbered as the servers' are; None: it computes on the CPU.
        on_cpu: Whether a server computes on a CPU.
    """
    if given is not None:
        return given
    if trainer_gpu is None or on_cpu:
        return ProcessGroupTransport("gloo")
    serving = {device for handle in servers.handles for device in handle.devices}
    if serving == {trainer_gpu}:
        return IPCTransport()
    return DiskTransport() if trainer_gpu in serving else ProcessGroupTransport("nccl")
