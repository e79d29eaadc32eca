"""SGLang on this machine's GPUs, in an environment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ConfigError
from lightning_grpo.servers.devices import (
    SHARED_MEMORY_FRACTION,
    present_devices,
    serving_devices,
)
from lightning_grpo.servers.owned import OwnedServers
from lightning_grpo.servers.ports import free_ports
from lightning_grpo.servers.process import Launch
from lightning_grpo.servers.server_python import resolve_python

OWN_FLAGS = ("model-path", "port", "tp-size", "mem-fraction-static")
"""Flags that have a parameter, or that the run sets itself."""


class SGLangServers(OwnedServers):
    """Starts SGLang servers, one for every `tp` GPUs, and ends them with the run.

    Args:
        num_servers: How many; None: as many as `devices` allow.
        tp: GPUs of one server (tensor parallel).
        devices: GPUs that serve; None: half of the machine's, rounded up; a single GPU is shared.
        memory_fraction: Of a GPU's memory for weights and cache; None: 0.4 on a shared GPU, else
            SGLang's own choice.
        python: Interpreter that has SGLang; "auto": what `lightning-grpo install-server` made,
            else this one.
        port_range: Where free ports are looked for, the end excluded.
        start_timeout_s: How long all of them may take to answer (kernels may have to be compiled).
        log_dir: Where their output goes; None: `servers/` in the run's folder.
        flags: Further flags of `sglang.launch_server`: `{"attention-backend": "triton"}`; true is
            a bare flag, false and null leave it out.
    """

    def __init__(
        self,
        num_servers: int | None = None,
        tp: int = 1,
        devices: list[int] | None = None,
        memory_fraction: float | None = None,
        python: str = "auto",
        port_range: tuple[int, int] = (20000, 30000),
        start_timeout_s: float = 600.0,
        log_dir: str | None = None,
        flags: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_servers = num_servers
        self.tp = tp
        self.devices = devices
        self.memory_fraction = memory_fraction
        self.python = python
        self.port_range = port_range
        self.start_timeout_s = start_timeout_s
        self.log_dir = log_dir
        self.flags = {key.lstrip("-").replace("_", "-"): v for key, v in (flags or {}).items()}
        self._check()

    @property
    def on_cpu(self) -> bool:
        """Whether `flags` ask for the CPU."""
        return self.flags.get("device") == "cpu"

    def launches(self, model_path: str, run_dir: Path) -> Sequence[Launch]:
        """One `sglang.launch_server` for each group of `tp` GPUs."""
        python = resolve_python(self.python)
        groups, shared = self._device_groups()
        folder = Path(self.log_dir) if self.log_dir else run_dir / "servers"
        ports = free_ports(len(groups), self.port_range)
        return [
            Launch(
                self._command(python, model_path, port, shared=shared),
                folder / f"sglang-{slot}.log",
                {"CUDA_VISIBLE_DEVICES": ",".join(map(str, group))},
                f"http://127.0.0.1:{port}",
                group,
            )
            for slot, (group, port) in enumerate(zip(groups, ports, strict=True))
        ]

    def _command(self, python: str, model_path: str, port: int, *, shared: bool) -> list[str]:
        command = [python, "-m", "sglang.launch_server", "--model-path", model_path]
        command += ["--port", str(port), "--tp-size", str(self.tp)]
        if "host" not in self.flags:
            command += ["--host", "127.0.0.1"]
        fraction = self.memory_fraction
        if fraction is None and shared:
            fraction = SHARED_MEMORY_FRACTION
        if fraction is not None:
            command += ["--mem-fraction-static", str(fraction)]
        for name, value in self.flags.items():
            command += flag(name, value)
        return command

    def _device_groups(self) -> tuple[list[tuple[int, ...]], bool]:
        """The GPUs of each server, and whether the trainer uses them, too."""
        if self.on_cpu:
            return [()] * (self.num_servers or 1), False
        present = present_devices()
        devices = self.devices if self.devices is not None else serving_devices(present)
        if not devices:
            raise ConfigError(
                "SGLangServers needs a GPU and there is none here. Use EmbeddedServers on a CPU,"
                " RunningServers for servers elsewhere, or `flags: {device: cpu}`."
            )
        num_servers = self.num_servers or len(devices) // self.tp
        if num_servers * self.tp > len(devices) or num_servers < 1:
            raise ConfigError(
                f"`num_servers` x `tp` must be at most the number of serving GPUs, got"
                f" {self.num_servers} x {self.tp} for GPUs {devices}."
            )
        groups = [tuple(devices[i * self.tp : (i + 1) * self.tp]) for i in range(num_servers)]
        return groups, len(present) == 1

    def _check(self) -> None:
        if self.num_servers is not None and self.num_servers < 1:
            raise ConfigError(f"`num_servers` must be >= 1, got {self.num_servers}.")
        if self.tp < 1:
            raise ConfigError(f"`tp` must be >= 1, got {self.tp}.")
        if self.devices is not None and len(set(self.devices)) < len(self.devices):
            raise ConfigError(f"`devices` must not repeat, got {self.devices}.")
        if self.memory_fraction is not None and not 0 < self.memory_fraction < 1:
            raise ConfigError(
                f"`memory_fraction` must be between 0 and 1, got {self.memory_fraction}."
            )
        taken = [name for name in OWN_FLAGS if name in self.flags]
        if taken:
            raise ConfigError(
                f"`flags` must not set {', '.join(taken)}: the run does, or a parameter"
                " (`tp`, `memory_fraction`, `port_range`)."
            )


def flag(name: str, value: Any) -> list[str]:
    """A flag as a command line has it."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *map(str, values)]
