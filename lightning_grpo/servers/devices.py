"""Which GPUs are here, and which of them serve."""

from __future__ import annotations

import subprocess

from lightning_grpo.servers.environment import visible_devices


def present_devices() -> list[int]:
    """The GPUs that this process may use, by their number on the machine."""
    visible = visible_devices()
    return machine_devices() if visible is None else visible


def machine_devices() -> list[int]:
    """All GPUs of the machine.

    Asked of the driver's own tool, since torch is not needed to serve.
    """
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in listed.stdout.split()]


def device_bytes(device: int) -> int:
    """Memory of a GPU, by its number on the machine; 0 where nobody tells."""
    try:
        said = subprocess.run(
            [
                *("nvidia-smi", f"--id={device}", "--query-gpu=memory.total"),
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return int(said.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def serving_devices(present: list[int]) -> list[int]:
    """Half of the GPUs, rounded up, serve, the last ones; one GPU is shared with the trainer."""
    return present[len(present) // 2 :] if len(present) > 1 else present


def training_devices(present: list[int], serving: list[int]) -> list[int]:
    """Positions, among the GPUs that are here, of those left to train: what `Trainer` counts in.

    One GPU is shared.
    """
    if len(present) == 1:
        return [0]
    return [position for position, device in enumerate(present) if device not in serving]
