"""Which setting is wrong: the written settings held against constructor signatures.

jsonargparse decides whether a configuration is valid; this runs only after it refused one, and
finds the key that it refused, so that the message can name one line and not seventy. Functions
here return nothing and raise the ConfigProblem that they find.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import isabstract, isclass
from typing import Any, get_args, get_origin

from typing_extensions import is_protocol

from lightning_grpo.cli.hints import (
    accepts,
    call_shape,
    has_constructor,
    is_call,
    is_component,
    members,
    type_name,
)
from lightning_grpo.cli.imports import (
    ImportPathError,
    Parameters,
    import_object,
    parameters,
    subclasses,
)
from lightning_grpo.cli.problem import ConfigProblem, nearest
from lightning_grpo.cli.sources import Setting

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_NO_CONFIG = "give `--config FILE` (quickstart.yaml and gsm8k.yaml are shipped)"
_SHOWN, _LISTED = 60, 8


def check_settings(settings: Setting, roots: Mapping[str, type]) -> None:
    """Look at every section.

    Args:
        settings: Everything that was written.
        roots: The class behind each section.

    Raises:
        ConfigProblem: The first setting that does not fit.
    """
    for section, root in roots.items():
        setting = settings.value.get(section)
        if setting is not None:
            check(section, root, setting)
        elif any(parameter.required for parameter in parameters(root).known.values()):
            raise ConfigProblem(section, "is missing", "", _NO_CONFIG)


def check(key: str, annotation: Any, setting: Setting) -> None:
    """Hold one setting against its type."""
    kinds = members(annotation)
    if Any in kinds or (setting.value is None and type(None) in kinds):
        return
    problems: dict[int, ConfigProblem] = {}
    for index, kind in enumerate(kinds):
        try:
            _check_kind(key, kind, setting)
        except ConfigProblem as problem:
            problems[index] = problem
        else:
            return
    raise _most_telling(key, annotation, setting, problems)


def _most_telling(
    key: str, annotation: Any, setting: Setting, problems: Mapping[int, ConfigProblem]
) -> ConfigProblem:
    """Of the problems with each member of a union, the one that was meant."""
    if isinstance(setting.value, dict) and "class_path" in setting.value:
        for index, kind in enumerate(members(annotation)):
            if is_component(kind):
                return problems[index]
    deepest = max(problems.values(), key=lambda problem: problem.key.count("."))
    if deepest.key != key or len(problems) == 1:
        return deepest
    meant = isinstance(setting.value, dict) or "." in str(setting.value)
    for index, kind in enumerate(members(annotation)):
        if meant and (is_component(kind) or is_call(kind)):
            return problems[index]
    return _wrong_type(key, annotation, setting)


def _check_kind(key: str, kind: Any, setting: Setting) -> None:
    """Hold a setting against one member of a union."""
    elements = _elements(key, kind, setting)
    if is_call(kind):
        _check_callable(key, kind, setting)
    elif is_component(kind):
        _check_component(key, kind, setting)
    elif elements:
        for element in elements:
            check(*element)
    elif not accepts(kind, setting):
        raise _wrong_type(key, kind, setting)


def _elements(key: str, kind: Any, setting: Setting) -> list[tuple[str, Any, Setting]]:
    """(key, type, setting) of a container's elements whose type has a constructor."""
    arguments = [a for a in get_args(kind) if a is not Ellipsis]
    is_container = get_origin(kind) in (list, tuple, dict)
    if not (is_container and arguments and has_constructor(arguments[-1])):
        return []
    if isinstance(setting.value, list):
        return [(f"{key}[{i}]", arguments[-1], v) for i, v in enumerate(setting.value)]
    if get_origin(kind) is dict and isinstance(setting.value, dict):
        return [(f"{key}.{k}", arguments[-1], v) for k, v in setting.value.items()]
    return []


def _check_component(key: str, cls: type, setting: Setting) -> None:
    """A class by `class_path` and `init_args`, or by its arguments alone."""
    written = {"class_path": setting} if isinstance(setting.value, str) else setting.value
    if not isinstance(written, dict):
        raise _wrong_type(key, cls, setting)
    path = written.get("class_path")
    if path is not None:
        _check_class_path(key, cls, path, setting, written)
    elif isabstract(cls) or is_protocol(cls):
        rule = f"needs `class_path`, the import path of a {cls.__name__}"
        raise ConfigProblem(key, rule, setting.where, _known(cls))
    else:
        _check_arguments(key, cls.__name__, parameters(cls), setting, written)


def _check_class_path(
    key: str, cls: type, path: Setting, setting: Setting, written: Mapping[str, Setting]
) -> None:
    found = _import(key, path, cls)
    # What satisfies a protocol is known only when it is built.
    if not is_protocol(cls) and not (isclass(found) and issubclass(found, cls)):
        rule = f"must be a {cls.__name__}, and `{path.value}` is not one"
        raise ConfigProblem(key, rule, path.where, _known(cls))
    if isabstract(found):
        missing = ", ".join(f"`{name}`" for name in sorted(found.__abstractmethods__))
        rule = f"must be a class that is complete, and `{path.value}` does not define {missing}"
        raise ConfigProblem(key, rule, path.where)
    _check_init_args(key, str(path.value), parameters(found), setting, written)


def _check_callable(key: str, kind: Any, setting: Setting) -> None:
    """A function by import path, or a class that is called with what the caller supplies."""
    written = setting.value
    path = written.get("class_path") if isinstance(written, dict) else setting
    if path is None or not isinstance(path.value, str):
        raise _wrong_type(key, kind, setting)
    supplied, result = call_shape(kind)
    found = _import(key, path, result)
    if not callable(found):
        rule = f"must be a function or class, and `{path.value}` is a {type(found).__name__}"
        raise ConfigProblem(key, rule, path.where)
    if isclass(found) and not issubclass(found, result):
        rule = f"must make a {result.__name__}, and `{path.value}` does not"
        raise ConfigProblem(key, rule, path.where, _known(result))
    if isinstance(written, dict):
        accepted = parameters(found).without_first(supplied)
        _check_init_args(key, path.value, accepted, setting, written)


def _check_init_args(
    key: str, path: str, accepted: Parameters, setting: Setting, written: Mapping[str, Setting]
) -> None:
    """The arguments under `init_args`, or, on the command line, beside the class path."""
    name = path.rpartition(".")[2]
    beside = {k: v for k, v in written.items() if k not in _CLASS_KEYS}
    inner = written.get("init_args")
    if inner is None or not isinstance(inner.value, dict):
        _check_arguments(key, name, accepted, setting, beside)
    elif beside:
        _check_arguments(key, name, accepted, setting, {**inner.value, **beside})
    else:
        _check_arguments(f"{key}.init_args", name, accepted, inner, inner.value)


def _check_arguments(
    key: str, name: str, accepted: Parameters, setting: Setting, written: Mapping[str, Setting]
) -> None:
    """Unknown arguments, then each argument's own value, then missing ones."""
    for argument, value in written.items():
        if argument not in accepted.known and not accepted.open:
            rule = f"is not a setting of {name}, got {_show(value)}"
            way_out = nearest(argument, accepted.known, f"{key}.")
            raise ConfigProblem(f"{key}.{argument}", rule, value.where, way_out)
    for argument, value in written.items():
        if argument in accepted.known:
            check(f"{key}.{argument}", accepted.known[argument].annotation, value)
    for argument, parameter in accepted.known.items():
        if parameter.required and argument not in written:
            rule = f"is missing: {name} has no default for it"
            raise ConfigProblem(f"{key}.{argument}", rule, setting.where)


def _import(key: str, path: Setting, base: type) -> Any:
    """The object at an import path."""
    try:
        return import_object(str(path.value), base)
    except ImportPathError as error:
        raise ConfigProblem(key, str(error), path.where, error.suggestion) from error


def _known(cls: type) -> str:
    """What could stand there."""
    names = list(subclasses(cls))
    return f"known: {', '.join(names[:_LISTED])}" if names else ""


def _wrong_type(key: str, annotation: Any, setting: Setting) -> ConfigProblem:
    rule = f"must be {type_name(annotation)}, got {_show(setting)}"
    return ConfigProblem(key, rule, setting.where)


def _show(setting: Setting) -> str:
    text = repr(setting.plain())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 4] + " ..."
