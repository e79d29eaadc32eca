"""The servers' own environment: made once, remembered, and found again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_grpo.errors import ConfigError, ServerError
from lightning_grpo.servers.environment import config_folder, data_folder

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

ROOM_GB = {"cpu": 4, "cuda": 15}
"""What to keep free for an environment, with pip's cache left out."""

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


def describe_room(folder: Path, device: str) -> str:
    """How much room an environment wants, and how much there is."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / 1e9
    return f"allow {ROOM_GB[device]} GB in {folder}, where {free:.0f} GB are free"


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
