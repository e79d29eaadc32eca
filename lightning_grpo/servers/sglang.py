"""SGLang on this machine's GPUs, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.checks import MOST_PORT, MOST_SERVERS, require_count, require_seconds
from lightning_grpo.errors import ConfigError
from lightning_grpo.servers import serve_sglang
from lightning_grpo.servers.devices import device_bytes, present_devices, serving_devices
from lightning_grpo.servers.installed import ServerPython, resolve_python
from lightning_grpo.servers.owned import OwnedServers
from lightning_grpo.servers.ports import free_ports
from lightning_grpo.servers.process import Launch
from lightning_grpo.servers.sizing import (
    SHARED_FRACTION,
    ServerSize,
    servers_per_gpu,
    size_servers,
)

OWN_FLAGS = (
    *("model-path", "port", "tp-size", "mem-fraction-static"),
    *("api-key", "admin-api-key", "config"),
)
"""Flags that have a parameter, or that the run sets itself."""

CPU_FLAGS: dict[str, Any] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "dtype": "float32",
    "disable-overlap-schedule": True,
    "disable-cuda-graph": True,
    "max-total-tokens": 32768,
    "max-running-requests": 64,
}
"""What serves on a CPU, in the precision in which a probe is exact; `flags` overrides each."""

CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # Two busy OpenMP threads in each of its processes are many times slower than one.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class SGLangServers(OwnedServers):
    """Starts SGLang servers, one for every `tp` GPUs, and ends them with the run.

    On the CPU if `flags` say `device: cpu`, or if `python` is an environment that
    `lightning-grpo install-server --cpu` made.

    Args:
        num_servers: How many; None: one for each `tp` of `devices`, and several on each where a
            small model leaves a GPU waiting for its server (`tp` 1).
        tp: GPUs of one server (tensor parallel).
        devices: GPUs that serve; None: half of the machine's, rounded up; a single GPU is shared.
        memory_fraction: Of a GPU's memory for weights and cache; None: what the run's requests
            need, as far as a trainer on the same GPU leaves room.
        python: Interpreter that has SGLang; "auto": what `lightning-grpo install-server` made,
            else this one.
        port_range: Where free ports are looked for, the end excluded.
        start_timeout_s: How long all of them may take to answer (kernels may have to be compiled).
        log_dir: Where their output goes; None: `servers/` in the run's folder.
        flags: Further flags of `sglang.launch_server`: `{"attention-backend": "triton"}`; true is
            a bare flag, false and null leave it out. What the run would choose (requests at once,
            graphs, context, cache) gives way to what stands here.
    """

    fits_load = True

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
        self._size: ServerSize | None = None
        self._check()

    def describe(self) -> str:
        """One line a server, and what was chosen for all of them."""
        lines = [super().describe()]
        if self._size is not None:
            lines.append(self._size.describe())
        return "\n".join(lines)

    def launches(self, model_path: str, run_dir: Path) -> Sequence[Launch]:
        """One `sglang.launch_server` (with its key) for each group of `tp` GPUs."""
        installed = resolve_python(self.python)
        on_cpu = self._on_cpu(installed)
        groups, shared, per_gpu = self._device_groups(on_cpu)
        folder = Path(self.log_dir) if self.log_dir else run_dir / "servers"
        ports = free_ports(len(groups), self.port_range)
        chosen: dict[str, Any] = dict(CPU_FLAGS) if on_cpu else {}
        fraction = self.memory_fraction
        if not on_cpu:
            self._size = self._fit(groups, shared, per_gpu)
            chosen = dict(self._size.flags) if self._size is not None else {}
            if fraction is not None:
                chosen.pop("max-total-tokens", None)  # as much as it holds
            elif self._size is not None:
                fraction = self._size.memory_fraction
            elif shared:
                fraction = SHARED_FRACTION
        flags = {"host": self.host} | chosen | self.flags
        environment = (CPU_ENVIRONMENT if on_cpu else {}) | self.key_environment()
        return [
            Launch(
                [
                    *(installed.python, serve_sglang.__file__, "--model-path", model_path),
                    *("--port", str(port), "--tp-size", str(self.tp)),
                    *flag("mem-fraction-static", fraction),
                    *(word for name, value in flags.items() for word in flag(name, value)),
                ],
                folder / f"sglang-{slot}.log",
                {"CUDA_VISIBLE_DEVICES": ",".join(map(str, group)), **environment},
                f"http://{self.host}:{port}",
                group,
            )
            for slot, (group, port) in enumerate(zip(groups, ports, strict=True))
        ]

    def _fit(self, groups: list[tuple[int, ...]], shared: bool, per_gpu: int) -> ServerSize | None:
        """How the servers suit the run's load; None where nobody said what it is."""
        if self.load is None:
            return None
        gpu_bytes = min(device_bytes(device) for group in groups for device in group)
        return size_servers(
            self.load,
            len(groups),
            gpu_bytes,
            tp=self.tp,
            per_gpu=per_gpu,
            shared=shared,
            given=self.flags,
        )

    def _on_cpu(self, installed: ServerPython) -> bool:
        return self.flags.get("device", installed.device) == "cpu"

    @property
    def planned_devices(self) -> tuple[int, ...]:
        """The GPUs that serve, as resolved from `devices` and what is here."""
        if self.flags.get("device") == "cpu":
            return ()
        return tuple(
            self.devices if self.devices is not None else serving_devices(present_devices())
        )

    def _device_groups(self, on_cpu: bool) -> tuple[list[tuple[int, ...]], bool, int]:
        """The GPUs of each server, whether the trainer uses them too, and servers on each GPU."""
        if on_cpu:
            return [()] * (self.num_servers or 1), False, 1
        present = present_devices()
        ours = present if self.dedicated else serving_devices(present)
        devices = self.devices if self.devices is not None else ours
        if not devices:
            raise ConfigError(
                "`servers.devices`: SGLangServers needs a GPU and there is none here. Use"
                " EmbeddedServers on a CPU,"
                " RunningServers for servers elsewhere, or `flags: {device: cpu}` with an"
                " environment made by `lightning-grpo install-server --cpu`."
            )
        per_gpu = 1
        if self.num_servers is None and self.tp == 1 and self.load is not None:
            per_gpu = servers_per_gpu(self.load, len(devices), os.cpu_count() or 1)
        elif self.num_servers is not None and self.tp == 1:
            per_gpu = max(1, self.num_servers // len(devices))
        devices = list(devices) * per_gpu
        num_servers = self.num_servers or len(devices) // self.tp
        if num_servers * self.tp > len(devices) or num_servers < 1:
            raise ConfigError(
                f"`num_servers` x `tp` must be at most the number of serving GPUs, got"
                f" {self.num_servers} x {self.tp} for GPUs {devices}."
            )
        groups = [tuple(devices[i * self.tp : (i + 1) * self.tp]) for i in range(num_servers)]
        return groups, len(present) == 1 and not self.dedicated, per_gpu

    def _check(self) -> None:
        if self.num_servers is not None:
            require_count("num_servers", self.num_servers, most=MOST_SERVERS)
        require_count("tp", self.tp, most=MOST_SERVERS)
        require_seconds("start_timeout_s", self.start_timeout_s)
        for device in self.devices or ():
            require_count("devices", device, least=0, most=MOST_SERVERS)
        for port in self.port_range:
            require_count("port_range", port, most=MOST_PORT + 1)
        if self.port_range[0] >= self.port_range[1]:
            raise ConfigError(
                f"`port_range` must be two ports, the smaller one first, got {self.port_range}."
            )
        if self.devices is not None and len(set(self.devices)) < len(self.devices):
            raise ConfigError(f"`devices` must not repeat, got {self.devices}.")
        if self.memory_fraction is not None and not 0 < self.memory_fraction < 1:
            raise ConfigError(
                f"`memory_fraction` must be between 0 and 1, got {self.memory_fraction}."
            )
        taken = [name for name in OWN_FLAGS if name in self.flags]
        if taken:
            raise ConfigError(
                f"`flags` must not set {', '.join(taken)}: the run does (each run's servers have a"
                " key of their own), or a parameter (`tp`, `memory_fraction`, `port_range`)."
            )


def flag(name: str, value: Any) -> list[str]:
    """A flag as a command line has it."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *map(str, values)]
