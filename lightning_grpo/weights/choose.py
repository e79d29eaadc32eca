"""Which transport, where the user named none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

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


def choose_transport(given: Transport | None, servers: Started) -> Transport:
    """The given transport, else one by what is there.

    On CPUs a gloo group. On GPUs an NCCL group, unless trainer and servers share one GPU: NCCL
    refuses two ranks on one device, so the server maps the trainer's memory there.
    """
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return ProcessGroupTransport("gloo")
    serving = {device for handle in servers.handles for device in handle.devices}
    if torch.cuda.device_count() == 1 and serving:
        return IPCTransport()
    return ProcessGroupTransport("nccl")
