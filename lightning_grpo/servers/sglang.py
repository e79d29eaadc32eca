"""SGLang: its environment and its processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_grpo.errors import (
    MOST_PORT,
    MOST_SERVERS,
    ConfigError,
    ServerError,
    require_count,
    require_seconds,
)
from lightning_grpo.servers import serve_sglang
from lightning_grpo.servers.base import (
    Machine,
    config_folder,
    data_folder,
    device_bytes,
    device_names,
    free_ports,
    present_devices,
    serving_devices,
)
from lightning_grpo.servers.process import Launch, OwnedServers
from lightning_grpo.servers.sizing import (
    SHARED_FRACTION,
    ServerLayout,
    ServerSize,
    ServersTooLargeError,
    servers_per_gpu,
    size_servers,
)
from lightning_grpo.serving.fitness import local_config

# -- the environment -------------------------------------------------------------------------------

SGLANG_VERSION = "0.5.19"
"""What `install-server` installs unless told otherwise; rollouts and updates were tested on it."""

FILE_NAME = "server-python.json"
MANY = 3
NOT_ON_CPU = frozenset(
    """
    build cuda-python cuda-tile flash-attn-4 flashinfer-python humming-kernels kernels
    nvidia-cutlass-dsl nvidia-mathdx quack-kernels sgl-deep-ep sgl-deep-gemm sgl-kernel
    sglang-kernel smg-grpc-servicer tilelang timm tokenspeed-mla torch-memory-saver torchaudio
    torchcodec
    """.split()
)
"""Needs of SGLang that a server of text models on a CPU never calls."""

NEEDLESS = ("outlines", "xgrammar")
"""Imported by SGLang; what they themselves need is not."""

FIND_SGLANG = """
import importlib.metadata as metadata
try:
    print(metadata.version("sglang"))
except metadata.PackageNotFoundError:
    pass
"""
"""Prints the version, or nothing where there is none."""

LIST_NEEDS = """
import importlib.metadata, re
from pip._vendor.packaging.requirements import Requirement
for text in importlib.metadata.requires("sglang"):
    need = Requirement(text)
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        print(re.sub("[-_.]+", "-", need.name).lower(), text.split(";")[0].strip(), sep="\\t")
"""
"""Run in the new environment: one line for each need, `name<TAB>requirement`."""


@dataclass(frozen=True)
class ServerPython:
    """An interpreter that has SGLang.

    Attributes:
        python: Its path.
        sglang: Version of SGLang; empty where nobody looked.
        device: What the environment was made for: `cuda` or `cpu`.
    """

    python: str
    sglang: str = ""
    device: str = "cuda"


def remember_python(installed: ServerPython) -> Path:
    """Makes `installed` what "auto" means from now on; returns the file that says so."""
    file = config_folder() / FILE_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(installed), indent=1) + "\n", encoding="utf-8")
    return file


def remembered_python() -> ServerPython | None:
    """What was remembered, if it is still there."""
    try:
        installed = ServerPython(**json.loads((config_folder() / FILE_NAME).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return installed if Path(installed.python).is_file() else None


def resolve_python(python: str) -> ServerPython:
    """The interpreter that starts SGLang.

    "auto" is the one that `lightning-grpo install-server` made, else this one if it has SGLang.

    Raises:
        ConfigError: There is none.
    """
    remembered = remembered_python()
    if python != "auto":
        if not Path(python).is_file():
            raise ConfigError(
                f"`servers.python` must be an interpreter with SGLang, got {python!r}. Leave it"
                " out to use the one that `lightning-grpo install-server` makes."
            )
        known = remembered is not None and remembered.python == python
        return remembered if known and remembered else ServerPython(python)
    if remembered is not None:
        return remembered
    if importlib.util.find_spec("sglang") is not None:
        return ServerPython(sys.executable)
    raise ConfigError(
        "`servers.python` names no interpreter and SGLang is not installed here. Make its"
        " environment with `lightning-grpo install-server`, or use EmbeddedServers (CPU)."
    )


def install_server(
    folder: Path | None = None,
    version: str = SGLANG_VERSION,
    device: str = "cuda",
    pip_arguments: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> ServerPython:
    """Makes a virtual environment with SGLang and nothing of the trainer.

    Args:
        folder: Where; None: this user's data folder. What is there is completed, not made anew.
        version: Of SGLang.
        device: `cuda`, or `cpu`: without what only a GPU needs.
        pip_arguments: Further options for every call of pip.
        say: Told what is done.

    Raises:
        ServerError: A step failed; with the end of its output.
    """
    folder = server_folder(folder, version, device)
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder}")
        _run([sys.executable, "-m", "venv", str(folder)])

    def pip(*packages: str) -> None:
        say("installing " + (packages[-1] if len(packages) < MANY else f"{len(packages)} packages"))
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        _run([*command, *pip_arguments, *packages])

    if device == "cpu":
        pip("--no-deps", f"sglang=={version}")
        for group in needs_on_cpu(_run([str(python), "-c", LIST_NEEDS])):
            pip(*group)
    else:
        pip(f"sglang=={version}")
    return examine_python(python, device)


def server_folder(folder: Path | None, version: str, device: str) -> Path:
    """Where an environment goes: the folder given, else one in this user's data folder."""
    return (folder or data_folder() / f"sglang-{version}-{device}").absolute()


def examine_python(python: Path, device: str) -> ServerPython:
    """What an interpreter has.

    Raises:
        ConfigError: It has no SGLang, or is no interpreter.
    """
    command = [str(python), "-c", FIND_SGLANG]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{python} can't be run as a Python: {error.strerror}.") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(f"{python} can't be asked for SGLang: {said}")
    if not done.stdout.strip():
        raise ConfigError(
            f"{python} has no SGLang. Name an interpreter that has it, install it there "
            f"(`{python} -m pip install sglang=={SGLANG_VERSION}`), or let `lightning-grpo "
            "install-server` make an environment of its own."
        )
    return ServerPython(str(python), done.stdout.strip(), device)


def needs_on_cpu(listed: str) -> list[list[str]]:
    """Arguments of pip, call by call: torch first, and again, so that nothing moves its build.

    Args:
        listed: What `LIST_NEEDS` prints.
    """
    needs = dict(line.split("\t") for line in listed.splitlines() if line)
    torch = needs.pop("torch", "torch")
    kept = {name: need for name, need in needs.items() if name not in NOT_ON_CPU}
    alone = [kept.pop(name) for name in NEEDLESS if name in kept]
    groups = [[torch], [torch, *kept.values(), "triton"]]
    return [*groups, ["--no-deps", *alone]] if alone else groups


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ServerError(f"{' '.join(command[:6])} ... failed:\n{end}")
    return done.stdout


# -- the servers -----------------------------------------------------------------------------------

OWN_FLAGS = (
    *("model-path", "port", "tp-size", "mem-fraction-static"),
    *("api-key", "admin-api-key", "config"),
)
"""Flags that have a parameter, or that the run sets itself."""

DETERMINISTIC = "enable-deterministic-inference"
DETERMINISTIC_BACKENDS = ("fa3", "flashinfer", "triton")
"""Attention whose result for a request does not depend on what else is in its batch."""

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


def cpu_environment(tp: int) -> dict[str, str]:
    """Variables of a server on a CPU, whose processes share each layer if there are several."""
    if tp == 1:
        return CPU_ENVIRONMENT
    cores = sorted(os.sched_getaffinity(0))
    # Without it there may be no more of them than memory nodes, most often one.
    each_on_one = "|".join(str(cores[rank % len(cores)]) for rank in range(tp))
    return CPU_ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": each_on_one}


OWN_HEAD = tuple(
    f"{name}ForCausalLM" for name in ("Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe", "Qwen3Next")
)
"""What SGLang gives a head of its own (0.5.19), also where the model's is its embedding."""


class SGLangServers(OwnedServers):
    """Starts SGLang servers, one for every `tp` GPUs, and ends them with the run.

    On the CPU if `flags` say `device: cpu`, or if `python` is an environment that
    `lightning-grpo install-server --cpu` made.

    Args:
        num_servers: How many; None: one for each `tp` of `devices`, and several on each where a
            small model leaves a GPU waiting for its server (`tp` 1).
        tp: GPUs of one server (tensor parallel); on a CPU its processes, each on a core.
        devices: GPUs that serve, numbered as `Trainer(devices=...)` numbers them: among those that
            CUDA_VISIBLE_DEVICES leaves. None: half of them, rounded up; a single GPU is shared.
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
    machine: Machine | None = None
    """What is planned for, in the place of this machine; nothing can be started there."""

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
        _check_head(model_path)
        on_cpu = self._on_cpu(installed)
        layout = self.layout(on_cpu)
        groups = layout.groups
        folder = Path(self.log_dir) if self.log_dir else run_dir / "servers"
        ports = free_ports(len(groups), self.port_range)
        chosen: dict[str, Any] = dict(CPU_FLAGS) if on_cpu else {}
        fraction = self.memory_fraction
        if not on_cpu:
            self._size = layout.size
            chosen = dict(self._size.flags) if self._size is not None else {}
            if fraction is None and self._size is not None:
                fraction = self._size.memory_fraction
            elif fraction is None and layout.shared:
                fraction = SHARED_FRACTION
        if self.tells_routes:
            chosen["enable-return-routed-experts"] = True
        if self.deterministic:
            self._check_deterministic(on_cpu)
            chosen[DETERMINISTIC] = True
        flags = {"host": self.host} | chosen | self.flags
        environment = (cpu_environment(self.tp) if on_cpu else {}) | self.key_environment()
        names = device_names()
        return [
            Launch(
                [
                    *(installed.python, serve_sglang.__file__, "--model-path", model_path),
                    *("--port", str(port), "--tp-size", str(self.tp)),
                    *flag("mem-fraction-static", fraction),
                    *(word for name, value in flags.items() for word in flag(name, value)),
                ],
                folder / f"sglang-{slot}.log",
                {"CUDA_VISIBLE_DEVICES": ",".join(names[i] for i in group), **environment},
                f"http://{self.host}:{port}",
                group,
            )
            for slot, (group, port) in enumerate(zip(groups, ports, strict=True))
        ]

    def _check_deterministic(self, on_cpu: bool) -> None:
        """Refuse what would leave a deterministic run's completions to chance."""
        way_out = "Or leave `trainer.deterministic` out."
        if on_cpu:
            raise ConfigError(
                "trainer.deterministic",
                "needs SGLang's deterministic inference, which it has on GPUs alone",
                way_out=f"On a CPU use EmbeddedServers. {way_out}",
            )
        backend = self.flags.get("attention-backend", DETERMINISTIC_BACKENDS[0])
        if backend not in DETERMINISTIC_BACKENDS:
            raise ConfigError(
                "servers.flags.attention-backend",
                f"must be one of {', '.join(DETERMINISTIC_BACKENDS)} in a deterministic run",
                backend,
                way_out,
            )
        if self.flags.get(DETERMINISTIC, True) is not True:
            raise ConfigError(
                f"servers.flags.{DETERMINISTIC}",
                "must be on in a deterministic run",
                self.flags[DETERMINISTIC],
                way_out,
            )

    def layout(self, on_cpu: bool = False) -> ServerLayout:
        """Choose the GPUs of each server, and how it suits the load.

        Of several servers on a GPU there are as many as fit.

        Raises:
            ConfigError: There are too few GPUs.
            ServersTooLargeError: There is too little of their memory.
        """
        groups, shared, per_gpu = self._device_groups(on_cpu)
        while self.load is not None and not on_cpu:
            try:
                size = self._size_of(groups, shared, per_gpu)
            except ServersTooLargeError:
                if per_gpu == 1 or self.num_servers is not None:
                    raise
                per_gpu -= 1
                groups = groups[: len(groups) // (per_gpu + 1) * per_gpu]
            else:
                return ServerLayout(groups, shared, per_gpu, size)
        return ServerLayout(groups, shared, per_gpu, None)

    def _size_of(self, groups: list[tuple[int, ...]], shared: bool, per_gpu: int) -> ServerSize:
        assert self.load is not None
        gpu_bytes = 0  # to be filled as far as the user has said
        if self.memory_fraction is None:
            gpu_bytes = min(self._gpu_bytes(device) for group in groups for device in group)
        return size_servers(
            self.load,
            len(groups),
            gpu_bytes,
            tp=self.tp,
            per_gpu=per_gpu,
            shared=shared,
            given=self.flags,
        )

    def _present(self) -> list[int]:
        return present_devices() if self.machine is None else self.machine.present

    def _gpu_bytes(self, device: int) -> int:
        if self.machine is None:
            return device_bytes(device_names()[device])
        return self.machine.gpu_bytes

    def _on_cpu(self, installed: ServerPython) -> bool:
        return self.flags.get("device", installed.device) == "cpu"

    @property
    def planned_devices(self) -> tuple[int, ...]:
        """The GPUs that serve, as resolved from `devices` and what is here."""
        if self.flags.get("device") == "cpu":
            return ()
        return tuple(self.devices if self.devices is not None else serving_devices(self._present()))

    def _device_groups(self, on_cpu: bool) -> tuple[list[tuple[int, ...]], bool, int]:
        """The GPUs of each server, whether the trainer uses them too, and servers on each GPU."""
        if on_cpu:
            return [()] * (self.num_servers or 1), False, 1
        present = self._present()
        ours = present if self.dedicated else serving_devices(present)
        devices = self.devices if self.devices is not None else ours
        if not devices or not present:
            raise ConfigError(
                "`servers.devices`: SGLangServers needs a GPU and there is none here. Use"
                " EmbeddedServers on a CPU,"
                " RunningServers for servers elsewhere, or `flags: {device: cpu}` with an"
                " environment made by `lightning-grpo install-server --cpu`."
            )
        if beyond := sorted(set(devices) - set(present)):
            raise ConfigError(
                f"`servers.devices` must be GPUs 0 to {len(present) - 1}, numbered among those that"
                f" CUDA_VISIBLE_DEVICES leaves, as `trainer.devices` are, got {beyond}."
            )
        per_gpu = 1
        if self.num_servers is None and self.tp == 1 and self.load is not None:
            cores = os.cpu_count() or 1 if self.machine is None else self.machine.cores
            per_gpu = servers_per_gpu(self.load, len(devices), cores)
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


def _check_head(model_path: str) -> None:
    """Refuse a model that SGLang would answer for at random: its head would stay empty."""
    config = local_config(model_path)
    kinds = set(OWN_HEAD).intersection(config.get("architectures") or ())
    if kinds and config.get("tie_word_embeddings"):
        raise ConfigError(
            "model",
            f"must have a head of its own for SGLang to serve a {kinds.pop()}; its "
            "`tie_word_embeddings` is true",
            model_path,
            "Load it with transformers, set `config.tie_word_embeddings = False`, give "
            "`lm_head.weight` a copy of the embedding, and save it; or use EmbeddedServers.",
        )


def flag(name: str, value: Any) -> list[str]:
    """A flag as a command line has it."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *map(str, values)]
