"""The one place where the command line reads and sets environment variables."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from lightning_grpo.errors import ConfigError

TRACEBACK = "LIGHTNING_GRPO_TRACEBACK"
"""Set to anything but 0, errors keep their tracebacks."""


_HARMLESS = ("antigravity", "docs", "examples", "scripts", "test", "tests", "this", "turtle")
"""Names that a folder of one's own has, and no program imports by."""

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Set by launchers: Lightning's, torchrun, srun."""


def prepare_imports() -> None:
    """Make files of the current folder importable and torch's C++ quiet, also in children.

    Ranks, reward workers and engines inherit `PYTHONPATH`, so `reward: my_rewards.f` means the
    same in all of them.

    Raises:
        ConfigError: A file of the folder would take the place of a module that others need.
    """
    here = os.getcwd()
    refuse_hiding(Path(here))
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    folders = looked_in()
    if here not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *folders])
    # Its warnings are about its own tear-down, such as memory that a stopped server had mapped.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def import_from(configs: Iterable[Path]) -> None:
    """Make files beside configs importable, after those of the current folder; also in children.

    A folder whose `yaml.py` would take the place of a module that others need is left out.
    """
    for folder in (str(config.absolute().parent) for config in configs):
        if folder in looked_in() or hiding(Path(folder)):
            continue
        inherited = looked_in()
        for places in (sys.path, inherited):
            here = [at for at, place in enumerate(places) if place in ("", os.getcwd())]
            places.insert(here[0] + 1 if here else 0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(inherited)


def looked_in() -> list[str]:
    """The folders of modules that are not installed."""
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


def refuse_hiding(folder: Path) -> None:
    """Refuse a folder whose `yaml.py` every import of `yaml` would find first.

    Raises:
        ConfigError: Which file it is.
    """
    file = hiding(folder)
    if file is not None:
        raise ConfigError(
            f"`{file.name}` in the current folder must have another name: {file.stem!r} is a "
            "module that this program needs, and this one would be imported in its place. Rename "
            "it, or run in another folder."
        )


def hiding(folder: Path) -> Path | None:
    """The file, or the package, of a folder that has the name of a module that is needed."""
    files = {file.stem: file for file in folder.glob("*.py")}
    files |= {file.parent.name: file.parent for file in folder.glob("*/__init__.py")}
    elsewhere = [place for place in sys.path if place and Path(place) != folder]
    return next(
        (
            file
            for name, file in sorted(files.items())
            if name not in _HARMLESS and _is_needed(name, file, elsewhere)
        ),
        None,
    )


def _is_needed(name: str, file: Path, elsewhere: list[str]) -> bool:
    """Whether a module of that name is Python's own, or that of a package we depend on."""
    if name in sys.stdlib_module_names:
        return True
    found = PathFinder.find_spec(name, elsewhere)
    if found is None or found.origin is None or Path(found.origin).is_relative_to(file):
        return False  # there is no other; or it is itself, installed to be worked on
    return not _dependencies().isdisjoint(metadata.packages_distributions().get(name, ()))


@cache
def _dependencies() -> set[str]:
    """The distributions that this one depends on, and those that they depend on."""
    found: set[str] = set()
    waiting = ["lightning-grpo"]
    while waiting:
        name = waiting.pop()
        with suppress(metadata.PackageNotFoundError):
            distribution = metadata.distribution(name)
            if distribution.name not in found:
                found.add(distribution.name)
                waiting += [re.split(r"[^\w.-]", need)[0] for need in distribution.requires or ()]
    return found


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks in place of messages."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and makes the run's folder."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def set_one_thread_default() -> bool:
    """Give this process and its children one compute thread each, unless the user chose.

    Returns:
        Whether the default was set (then torch, already loaded, must be told too).
    """
    if "OMP_NUM_THREADS" in os.environ:
        return False
    os.environ["OMP_NUM_THREADS"] = "1"
    return True


def silence_jsonargparse() -> None:
    """Hide that Lightning 2.6 calls jsonargparse 4.53 by deprecated names: not the user's fault."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
