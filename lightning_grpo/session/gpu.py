"""The GPU of this rank, and what follows from having one."""

from __future__ import annotations

import torch

from lightning_grpo.servers.devices import present_devices


def serving_dtype() -> torch.dtype | None:
    """Servers on GPUs compute in bf16, so no more than that travels; on CPUs in fp32."""
    return torch.bfloat16 if torch.cuda.is_available() else None


def this_gpu() -> torch.device | None:
    """Where weights leave from, also those that are kept in host memory."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def current_gpu() -> int | None:
    """This rank's GPU by its number on the machine."""
    if not torch.cuda.is_available():
        return None
    present, position = present_devices(), torch.cuda.current_device()
    return present[position] if position < len(present) else None


def release_shared_memory() -> None:
    """Free what servers on this GPU had mapped; torch would complain of it when it ends."""
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()
