"""Constructor arguments as plain data, so that every checkpoint loads with `weights_only=True`.

An object that was built from a dataclass or a plain class becomes `{class_path, init_args}`, a
function becomes its import path. What has no import path (a lambda, a class in a notebook cell)
can't be restored: it is listed under `not_restored` and has to be passed again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import math
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.keys import is_secret, masked

NOT_RESTORED = "not_restored"
_LONG = 20
"""Longer lists are data, and no setting."""
_OWN = ("lightning_grpo.algorithm.", "lightning_grpo.policy.lora", "lightning_grpo.module")
"""Where this package keeps what a module is built from."""
_INSTALLED = [
    Path(folder).resolve()
    for folder in {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
]
_PACKAGES = ("site-packages", "dist-packages")
"""Also a user's own (`pip install --user`), the system's, and other environments' on the path."""
_PRIMITIVES = (str, int, float, bool, type(None))


def import_path(target: Any) -> str | None:
    """The dotted path that imports `target` again, or None where there is none."""
    module, name = target.__module__, target.__qualname__
    if module == "__main__" or "<" in name:
        return None
    return f"{module}.{name}"


def import_object(path: str) -> Any:
    """What `path` (`package.module.name`) names.

    Raises:
        CheckpointError: It can't be imported, or is nothing to build a module from.
    """
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise _refused(path)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"`{path}` of the checkpoint's hyper-parameters can't be imported ({error}). Make it "
            "importable (the folder on PYTHONPATH) or pass the argument again."
        ) from error
    if not _is_part_of_a_module(found):
        raise _refused(path)
    return found


def _is_part_of_a_module(found: Any) -> bool:
    """Whether it is of a kind to build a module from, and not whatever else can be imported.

    A checkpoint may be a stranger's, and to call what it names is to run what it says. So it may
    name parts of this package, optimizers, schedules, and the user's own code.
    """
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return False
    if inspect.isclass(found) and issubclass(found, Optimizer | LRScheduler):
        return True
    if found.__module__.startswith("lightning_grpo."):
        return found.__module__.startswith(_OWN)
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    places = Path(file).resolve().parents if file else ()
    return bool(places) and not any(
        folder in _INSTALLED or folder.name in _PACKAGES for folder in places
    )


def _refused(path: str) -> CheckpointError:
    return CheckpointError(
        f"`{path}` of the checkpoint's hyper-parameters is neither a part of lightning_grpo, nor "
        "an optimizer, a schedule or code of your own, so it is not run. If it belongs there, "
        "pass the argument again."
    )


def to_plain(
    arguments: Mapping[str, Any], from_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`arguments` as plain data, with the names of those that could not be under `not_restored`.

    Args:
        arguments: What the constructor got.
        from_config: How a config spells some of them; None outside the CLI.
    """
    spelled = from_config or {}
    plain: dict[str, Any] = {}
    not_restored: list[str] = []
    for name, value in arguments.items():
        # A config may give a dataclass's fields without its name; such objects tell both.
        read_back = dataclasses.is_dataclass(value)
        try:
            plain[name] = _plain(value if read_back else spelled.get(name, value))
        except _NoImportPathError:
            not_restored.append(name)
    plain[NOT_RESTORED] = not_restored
    return plain


def from_plain(value: Any) -> Any:
    """The object that `_plain` described; other values pass through."""
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    return _from_mapping(value) if isinstance(value, Mapping) else value


def _from_mapping(value: Mapping[str, Any]) -> Any:
    if "class_path" in value:
        init_args = {k: from_plain(v) for k, v in value.get("init_args", {}).items()}
        return import_object(value["class_path"])(**init_args)
    if value.keys() == {"function"}:
        return import_object(value["function"])
    return {k: from_plain(v) for k, v in value.items()}


def factory(value: Any) -> Callable[..., Any] | None:
    """A callable as given, or one that a checkpoint or config describes as plain data."""
    if isinstance(value, Mapping) and "class_path" in value:
        return functools.partial(import_object(value["class_path"]), **value.get("init_args", {}))
    return from_plain(value)


def build(name: str, make: Callable[[Any], Any], argument: Any, kind: type = object) -> Any:
    """The one object of a kind that a factory makes of its argument.

    Raises:
        ConfigError: It refuses its own settings, a negative learning rate for instance, or makes
            something else: several, none, or what Lightning's hook would return.
    """
    try:
        made = make(argument)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"`{name}` could not be built: {type(error).__name__}: {error}. Change its arguments."
        ) from error
    if not isinstance(made, kind):
        raise ConfigError(
            f"`{name}` must build one {kind.__name__}, got {type(made).__name__}. What needs more "
            "(a list, a dictionary) goes into `configure_optimizers` of a subclass; one optimizer "
            "takes several parameter groups, each with its learning rate."
        )
    if isinstance(made, Optimizer):
        _require_finite(name, made)
    return made


_FACTORS = ("lr", "weight_decay", "momentum", "dampening", "eps")
"""Of optimizers; torch refuses NaN in most of them, and infinity in none."""


def _require_finite(name: str, optimizer: Optimizer) -> None:
    """One step with another number breaks the weights."""
    for group in optimizer.param_groups:
        for factor in _FACTORS:
            value = group.get(factor)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(
                    f"`{factor}` of `{name}` must be finite, got {value}. Change its arguments."
                )


class _Trial(Optimizer):
    """Another optimizer's settings with nothing to train."""

    def __init__(self, optimizer: Optimizer) -> None:
        nothing = {"params": [torch.zeros(())]}
        super().__init__(
            [copy.deepcopy({**group, **nothing}) for group in optimizer.param_groups],
            optimizer.defaults,
        )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Train nothing."""


_MOST_TRIED = 10_000


def require_schedule(make: Callable[[Any], Any], optimizer: Optimizer, num_steps: int) -> None:
    """Take a schedule of torch's through the steps of a run, on a copy.

    Args:
        make: Builds it from an optimizer.
        optimizer: Whose learning rates it changes.
        num_steps: Of the run; the first 10,000 are tried.

    Raises:
        ConfigError: It fails, or gives a learning rate that no step may have.
    """
    trial = _Trial(optimizer)
    try:
        schedule = make(trial)
    except (TypeError, AttributeError):
        return  # it wants an optimizer of its own kind
    with warnings.catch_warnings(action="ignore"):
        for step in range(1, min(num_steps, _MOST_TRIED) + 1):
            trial.step()
            try:
                schedule.step()
            except (ArithmeticError, ValueError) as error:
                raise ConfigError(
                    f"`lr_scheduler` must last for the run's {num_steps} steps, and fails after "
                    f"step {step}: {type(error).__name__}: {error}. Change its arguments."
                ) from error
            rates = [float(group["lr"]) for group in trial.param_groups]
            if not all(0 <= rate < math.inf for rate in rates):
                raise ConfigError(
                    "`lr_scheduler` must give finite learning rates of at least 0, got "
                    f"{', '.join(map(str, rates))} after step {step}. Change its arguments."
                )


def loggable(value: Any, depth: int = 6) -> Any:
    """What loggers are told of a setting: plain data that is short, and no secrets.

    Args:
        value: An object; its class and what can be read of its arguments is told.
        depth: Of objects in objects; below it their class is told alone.
    """
    if isinstance(value, _PRIMITIVES):
        return masked(value) if isinstance(value, str) else value
    if isinstance(value, list | tuple | Mapping):
        return _loggable_items(value, depth)
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return _loggable_object(value, depth)


def _loggable_object(value: Any, depth: int) -> Any:
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    arguments = arguments_of(value) if depth else {}
    if arguments:
        return {"class_path": path, "init_args": _loggable_items(arguments, depth)}
    return f"{path} ({len(value)} items)" if hasattr(value, "__len__") else path


def _loggable_items(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping) and set(value) == {""}:  # one dataset, which needs no name
        return loggable(value[""], depth)
    if isinstance(value, Mapping) and depth:
        kept = {str(k): v for k, v in value.items() if not is_secret(str(k), v)}
        return {_legal_key(k): loggable(v, depth - 1) for k, v in kept.items()}
    if isinstance(value, Mapping) or len(value) > _LONG:
        return _sized(value)
    return [loggable(v, depth) for v in value]


def _legal_key(name: str) -> str:
    """A key without what MLflow refuses, which takes keys for the paths of files."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"


def _sized(value: Any) -> str:
    return f"{type(value).__name__} ({len(value)} items)"


def arguments_of(value: Any) -> dict[str, Any]:
    """The constructor's arguments as far as attributes of their names tell them."""
    try:
        names = [n for n in inspect.signature(type(value).__init__).parameters if n != "self"]
    except (TypeError, ValueError):
        return {}
    found = {n: vars(value)[n] for n in names if n in getattr(value, "__dict__", {})}
    functions = getattr(value, "reward_functions", None)
    return {**found, "reward": functions} if "reward" in names and functions else found


def require_restored(saved: Mapping[str, Any], given: Collection[str], owner: str) -> None:
    """Refuse arguments that a checkpoint could not keep and that were not passed again.

    Raises:
        CheckpointError: Which argument, and how to pass it.
    """
    missing = [name for name in saved.get(NOT_RESTORED, ()) if name not in given]
    if missing:
        raise CheckpointError(
            f"`{', '.join(missing)}` of this checkpoint's run has no import path (a lambda, or a "
            f"class of the script itself) and can't be restored. Pass it again: "
            f"{owner}({missing[0]}=...)."
        )


class _NoImportPathError(Exception):
    pass


def _plain(value: Any) -> Any:
    if isinstance(value, _PRIMITIVES):
        return value
    if isinstance(value, list | tuple | Mapping):
        return _plain_container(value)
    if inspect.isfunction(value) or inspect.isclass(value):
        return {"function": _path_of(value)}
    return {"class_path": _path_of(type(value)), "init_args": _init_args(value)}


def _plain_container(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): None if is_secret(k, v) else _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value]


def _path_of(target: Callable[..., Any] | type) -> str:
    path = import_path(target)
    if path is None:
        raise _NoImportPathError
    return path


def _init_args(value: Any) -> dict[str, Any]:
    """What `value` was built from: a dataclass's fields, or attributes named like parameters."""
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.init]
        return _plain_container({f.name: getattr(value, f.name) for f in fields})
    names = [n for n in inspect.signature(type(value).__init__).parameters if n != "self"]
    state = vars(value) if "__dict__" in dir(value) else {}
    if any(n not in state for n in names):
        # Its arguments can't be read back, so the object can't be built again.
        raise _NoImportPathError
    return _plain_container({n: state[n] for n in names})
