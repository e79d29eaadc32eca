"""Import paths and constructor signatures, as the configuration sees them."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import is_protocol

import lightning_grpo
from lightning_grpo.cli.problem import nearest


class ImportPathError(ImportError):
    """An import path leads nowhere.

    Args:
        message: The rest of a sentence that begins with the key.
        suggestion: The way out; may be empty.
    """

    def __init__(self, message: str, suggestion: str = "") -> None:
        super().__init__(message)
        self.suggestion = suggestion


@dataclass(frozen=True)
class Parameter:
    """One constructor argument."""

    annotation: Any
    required: bool


@dataclass(frozen=True)
class Parameters:
    """What a constructor accepts.

    Attributes:
        known: Its arguments by name.
        open: Whether it takes further keyword arguments.
    """

    known: dict[str, Parameter]
    open: bool = False

    def without_first(self, count: int) -> Parameters:
        """The same without the arguments that the caller supplies by position."""
        return Parameters(dict(list(self.known.items())[count:]), self.open)


def parameters(target: type | Callable[..., Any]) -> Parameters:
    """The arguments of a class or function; `**kwargs` continue with the base class's."""
    if not inspect.isclass(target):
        return _of_function(target, skip_self=False)
    known: dict[str, Parameter] = {}
    is_open = False
    for cls in target.__mro__[:-1]:
        if "__init__" not in vars(cls):
            continue
        own = _of_function(vars(cls)["__init__"], skip_self=True)
        known = {**own.known, **known}
        is_open = own.open
        if not is_open:
            break
    return Parameters(known, is_open)


def _of_function(function: Callable[..., Any], skip_self: bool) -> Parameters:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return Parameters({}, open=True)
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        hints = {}
    known, is_open = {}, False
    for name, parameter in list(signature.parameters.items())[1 if skip_self else 0 :]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            required = parameter.default is inspect.Parameter.empty
            known[name] = Parameter(hints.get(name, Any), required)
    return Parameters(known, is_open)


def import_object(path: str, base: type = object) -> Any:
    """What `package.module.name` names; the bare name of a known subclass of `base` also does.

    Raises:
        ImportPathError: It can't be imported.
    """
    module, _, name = path.rpartition(".")
    known = subclasses(base)
    if not module:
        if name in known:
            return known[name]
        near = nearest(name, known)
        if name in lightning_grpo.__all__:  # not loaded yet, so not among the known
            near = f"did you mean `lightning_grpo.{name}`?"
        raise ImportPathError(f"must be an import path (`package.module.name`), got {path!r}", near)
    imported = _import_module(path, module, known)
    try:
        return getattr(imported, name)
    except AttributeError as error:
        public = [n for n in dir(imported) if not n.startswith("_")]
        near = nearest(name, public, f"{module}.", list_all=False)
        rule = f"`{path}` can't be imported: `{module}` has no `{name}`"
        raise ImportPathError(rule, near) from error


def _import_module(path: str, module: str, known: Mapping[str, type]) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        rule = f"`{path}` can't be imported: there is no module `{error.name}`"
        raise ImportPathError(rule, nearest(path.rpartition(".")[2], known)) from error
    except (Exception, SystemExit) as error:
        # The user's module ran: whatever it raised is named as the reason.
        fault = f"{type(error).__name__}: {error}"
        raise ImportPathError(f"`{path}` can't be imported: {module} raised {fault}") from error


def subclasses(base: type) -> dict[str, type]:
    """The concrete subclasses of `base` that are loaded, itself included, by name."""
    if base is object or base is Any:
        return {}
    found: dict[str, type] = {}
    waiting = [base]
    while waiting:
        cls = waiting.pop(0)
        waiting += type.__subclasses__(cls)
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, cls)
    if is_protocol(base):
        found.pop(base.__name__, None)
    return found
