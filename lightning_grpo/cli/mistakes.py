"""Mistakes: which setting is wrong, what it accepts, and what was meant.

Which setting is wrong: the written settings held against constructor signatures.

jsonargparse decides whether a configuration is valid; this runs only after it refused one, and
finds the key that it refused, so that the message can name one line and not seventy. Functions
here return nothing and raise the ConfigProblem that they find.
"""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from inspect import isabstract, isclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import register_type
from typing_extensions import is_protocol

import lightning_grpo
from lightning_grpo.cli.main import looked_in
from lightning_grpo.cli.sources import ConfigProblem, Setting, is_config, nearest
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.prompts import Source, Table
from lightning_grpo.servers.base import Address

# What a config may write in the place of a class's import path.
for _kind in (Source, Table, Address):
    register_type(_kind, serializer=lambda given: given, fail_already_registered=False)

_KEY = re.compile(r'(?:Parser key|Key) "([^"]+)"')
_WORDS = re.compile(r"[\w.]+")
_NOISE = re.compile(r"^(Errors|Subtypes|Given value|Does not validate|Parser key|Problem with)")

_Leaf = tuple[str, Setting]
"""A dotted key, and what was written there."""


def condense(message: str, settings: Setting) -> ConfigProblem:
    """The parser's message as key, place and its most specific line."""
    key = ".".join(_KEY.findall(message))
    lines = [line.strip(" -") for line in message.splitlines()]
    telling = [line for line in lines if line and not _NOISE.match(line)]
    rule = max(telling, key=len) if telling else message
    return ConfigProblem(key, rule, _place(key, settings))


def _place(key: str, settings: Setting) -> str:
    """Where the key, or the nearest key above it, was written."""
    written = {k.replace("init_args.", ""): s.where for k, s in settings.walk()}
    while key:
        if key in written:
            return written[key]
        key = key.rpartition(".")[0]
    return ""


def locate(error: Exception, settings: Setting) -> ConfigProblem:
    """A refusal, at the setting that it is about.

    A record names it. Of a sentence (our own about several settings, Lightning's) it is one that
    stands there in backticks or with its value, or whose address is repeated there.
    """
    refusal = error if isinstance(error, ConfigError) else ConfigError(str(error))
    leaves = list(settings.walk())
    found = None
    if refusal.setting:
        given = str(refusal.value)
        found = _first([refusal.setting], leaves, lambda leaf: str(leaf[1].plain()) == given)
    found = found or _quoted(str(refusal), leaves)
    key, where = (found[0], found[1].where) if found else ("", "")
    return ConfigProblem(key, refusal.sentence, where, refusal.way_out)


def _first(
    names: Sequence[str], leaves: Sequence[_Leaf], is_meant: Callable[[_Leaf], bool]
) -> _Leaf | None:
    """The first setting of one of these names; of several the one that is meant.

    Else one that is no section: `model` is `model.model`, wherever the section begins.
    """
    for name in _spellings(names):
        if named := [kv for kv in leaves if _is_named(kv[0], name)]:
            values = [kv for kv in named if not isinstance(kv[1].value, dict)]
            return next(filter(is_meant, named), (values or named)[0])
    return None


def _quoted(message: str, leaves: Sequence[_Leaf]) -> _Leaf | None:
    """The setting that a sentence is about."""
    told = [leaf for leaf in leaves if _mentions(message, leaf)]
    names = [words[0] for text in message.split("`")[1::2] if (words := _WORDS.findall(text))]
    if found := _first(names, leaves, told.__contains__):
        return found
    for name in _WORDS.findall(message):
        if named := [leaf for leaf in told if _is_named(leaf[0], name)]:
            return named[0]
    # An address is long enough a word for its repetition to be no accident.
    repeated = [leaf for leaf in told if _is_address(leaf[1].plain())]
    # `got 'x'` is about what was given; what else the message repeats may be a way out.
    got = [leaf for leaf in repeated if repr(leaf[1].plain()) in message]
    return next(iter(got or repeated), None)


def _is_named(key: str, name: str) -> bool:
    return f".{key.replace('.init_args', '')}".endswith(f".{name}")


def _spellings(names: Sequence[str]) -> list[str]:
    """From the surest: whole, the owner where that is told by two, the last; then the owners."""
    spelled: list[str] = []
    for name in names:
        owner, _, last = name.rpartition(".")
        spelled += (name, owner, last) if "." in owner else (name, last)
    owners = [name.rpartition(".")[0] for name in names if "." in name]
    return [*spelled, *owners]


def _is_address(value: object) -> bool:
    return isinstance(value, str) and (":" in value or "/" in value)


def _mentions(message: str, leaf: _Leaf) -> bool:
    """Whether the message repeats the value as a word of its own."""
    value = re.escape(str(leaf[1].plain()))
    return re.search(rf"(?<![\w.]){value}(?![\w.])", message) is not None


def refused_build(error: BaseException, settings: Setting) -> ConfigProblem:
    """What a constructor raised, at the setting that it was built from.

    jsonargparse wraps it where the parameter is one of several types.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    frames = [frame for cause in causes for frame, _ in traceback.walk_tb(cause.__traceback__)]
    # What the first type said is the cause; what the others did stands in the parser's frame alone.
    others = [each for frame in frames for each in frame.f_locals.get("exceptions") or ()]
    for cause in (*causes, *others):
        if isinstance(cause, ConfigError):
            return locate(cause, settings)
    built = {name for frame in frames for name in _names_of(frame)}
    for key, setting in settings.walk():
        value = setting.value
        if isinstance(value, str) and value.rpartition(".")[2] in built:
            rule = f"`{value}` could not be built: {fault_of(causes[-1])}"
            return ConfigProblem(key.removesuffix(".class_path"), rule, setting.where)
    return locate(ConfigError(f"could not be built: {fault_of(causes[-1])}"), settings)


def fault_of(error: BaseException) -> str:
    """An exception of the user's code in one line, with its place."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return said
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _names_of(frame: FrameType) -> tuple[str, ...]:
    """The function that runs in a frame, and the class of the object that it builds."""
    name = frame.f_code.co_name
    owner = frame.f_locals.get("self")
    return (type(owner).__name__,) if name == "__init__" and owner is not None else (name,)


_PLAIN_MODULES = ("builtins", "datetime", "os", "pathlib", "typing")
_NAMES = {
    int: "an int",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
    Source: "the name of a dataset",
    Address: "the URL of a server",
    Table: "rows",
}


def members(annotation: Any) -> list[Any]:
    """The members of a union, in order; a plain type alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) for m in members(a)]
    return [annotation]


def is_call(member: Any) -> bool:
    """Whether it is a `Callable[...]`."""
    return member is Callable or get_origin(member) is Callable


def is_component(member: Any) -> bool:
    """Whether values of this type are made by a constructor with settings of its own."""
    return (
        isclass(member)
        and get_origin(member) is None
        and member.__module__ not in _PLAIN_MODULES
        and not issubclass(member, (Enum, str, int, float, Table))
    )


def has_constructor(annotation: Any) -> bool:
    """Whether settings of this type can have settings of their own."""
    return any(is_component(m) or is_call(m) for m in members(annotation))


def call_shape(member: Any) -> tuple[int, type]:
    """How many arguments the caller of a `Callable[[...], R]` supplies, and R if it is a class."""
    arguments = get_args(member)
    if not arguments:
        return 0, object
    supplied = len(arguments[0]) if isinstance(arguments[0], list) else 0
    results = [m for m in members(arguments[-1]) if is_component(m)]
    widest = [m for m in results if sum(issubclass(m, other) for other in results) == 1]
    return supplied, widest[0] if len(widest) == 1 else object


def accepts(annotation: Any, setting: Setting) -> bool:
    """Whether jsonargparse takes the value; on the command line also as text.

    It takes null for everything; here null stands only where the annotation names it.
    """
    if setting.value is None:
        return annotation is Any
    if annotation is Any or not (isclass(annotation) or get_origin(annotation)):
        return True
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    value = setting.plain()
    as_text = setting.where == "command line" and not isinstance(value, dict | list)
    candidates = [value, str(value)] if as_text else [value]
    return any(_parses(parser, candidate) for candidate in candidates)


def _parses(parser: ArgumentParser, value: Any) -> bool:
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def type_name(annotation: Any) -> str:
    """A type in words."""
    parts = members(annotation)
    choices = [str(choice) for part in parts for choice in _choices(part)]
    names = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    names += [_one_name(part) for part in parts if not _choices(part)]
    return " or ".join(dict.fromkeys(names))


def _choices(part: Any) -> list[Any]:
    if get_origin(part) is Literal:
        return list(get_args(part))
    if isclass(part) and get_origin(part) is None and issubclass(part, Enum):
        return [member.name for member in part]
    return []


def _one_name(part: Any) -> str:
    if is_call(part):
        return "the import path of a function"
    origin, arguments = get_origin(part), get_args(part)
    if origin in (list, tuple) and arguments:
        return f"a list, each {type_name(arguments[0])}"
    plain = origin or part
    return _NAMES.get(plain, plain.__name__ if isclass(plain) else str(part))


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
        ConfigProblem: It can't be imported; of no setting yet.
    """
    module, _, name = path.rpartition(".")
    known = subclasses(base)
    if not module:
        same = [each for each in _descendants(base) if each.__name__ == name and name in known]
        if len(same) > 1:
            rule = "must be an import path (`package.module.name`), since several have the name"
            last = same[-1]  # the most derived: what was made to be used here
            near = f"did you mean `{last.__module__}.{last.__qualname__}`?"
            raise ConfigProblem("", f"{rule} {name!r}", way_out=near)
        if same:
            return same[0]
        near = nearest(name, known)
        if name in lightning_grpo.__all__:  # not loaded yet, so not among the known
            near = f"did you mean `lightning_grpo.{name}`?"
        rule = f"must be an import path (`package.module.name`), got {path!r}"
        raise ConfigProblem("", rule, way_out=near)
    imported = _import_module(path, module, known)
    try:
        return getattr(imported, name)
    except AttributeError as error:
        public = [n for n in dir(imported) if not n.startswith("_")]
        near = nearest(name, public, f"{module}.", list_all=False)
        rule = f"`{path}` can't be imported: `{module}` has no `{name}`"
        raise ConfigProblem("", rule, way_out=near) from error


_ANOTHER_FOLDER = "run where it lies, or name its folder: `PYTHONPATH=FOLDER lightning-grpo ...`"


def _import_module(path: str, module: str, known: Mapping[str, type]) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        rule = f"`{path}` can't be imported: there is no module `{error.name}`"
        near = nearest(path.rpartition(".")[2], known)
        if f"{module}.".startswith(f"{error.name}."):  # itself, and not one that it imports
            looked = ", ".join(f"`{folder}`" for folder in looked_in())
            rule += f" in {looked}, nor is one installed" * bool(looked)
            near = near or _ANOTHER_FOLDER
        raise ConfigProblem("", rule, way_out=near) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # The user's module ran: whatever it raised is named as the reason.
        fault = f"{type(error).__name__}: {error}"
        rule = f"`{path}` can't be imported: {module} raised {fault}"
        raise ConfigProblem("", rule) from error


def subclasses(base: type) -> dict[str, type]:
    """The concrete subclasses of `base` that are loaded, itself included, by name."""
    found: dict[str, type] = {}
    for cls in _descendants(base):
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, cls)
    if is_protocol(base):
        found.pop(base.__name__, None)
    return found


def _descendants(base: type) -> list[type]:
    """The subclasses of `base` that are loaded, itself first, each once; none of everything."""
    found: list[type] = [] if base is object or base is Any else [base]
    for cls in found:
        derived: list[type] = type.__subclasses__(cls)
        found += [each for each in derived if each not in found]
    return found


CLASS_KEYS = frozenset(("class_path", "init_args", "dict_kwargs"))
NO_CONFIG = "give `--config FILE` (quickstart.yaml and gsm8k.yaml are shipped)"
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
            raise ConfigProblem(section, "is missing", "", NO_CONFIG)


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
    deepest = max(problems.values(), key=lambda problem: problem.setting.count("."))
    if deepest.setting != key or len(problems) == 1:
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
    if is_config(setting.value):
        return  # the parser reads it
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
        check_arguments(key, cls.__name__, parameters(cls), setting, written)


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
    check_init_args(key, str(path.value), parameters(found), setting, written)


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
        check_init_args(key, path.value, accepted, setting, written)


def check_init_args(
    key: str, path: str, accepted: Parameters, setting: Setting, written: Mapping[str, Setting]
) -> None:
    """The arguments under `init_args`, or, on the command line, beside the class path."""
    name = path.rpartition(".")[2]
    beside = {k: v for k, v in written.items() if k not in CLASS_KEYS}
    inner = written.get("init_args")
    if inner is None or not isinstance(inner.value, dict):
        check_arguments(key, name, accepted, setting, beside)
    elif beside:
        check_arguments(key, name, accepted, setting, {**inner.value, **beside})
    else:
        check_arguments(f"{key}.init_args", name, accepted, inner, inner.value)


def check_arguments(
    key: str, name: str, accepted: Parameters, setting: Setting, written: Mapping[str, Setting]
) -> None:
    """Unknown arguments, then each argument's own value, then missing ones."""
    for argument, value in written.items():
        if not (argument in accepted.known or accepted.open or value.is_carried):
            rule = f"is not a setting of {name}, got {_show(value)}"
            way_out = nearest(argument, accepted.known, f"{key}.")
            raise ConfigProblem(f"{key}.{argument}", rule, value.where, way_out)
    for argument, value in written.items():
        if argument in accepted.known and not value.is_carried:
            check(f"{key}.{argument}", accepted.known[argument].annotation, value)
    for argument, parameter in accepted.known.items():
        if parameter.required and argument not in written:
            rule = f"is missing: {name} has no default for it"
            raise ConfigProblem(f"{key}.{argument}", rule, setting.where)


def _import(key: str, path: Setting, base: type) -> Any:
    """The object at an import path."""
    try:
        return import_object(str(path.value), base)
    except ConfigProblem as error:
        raise ConfigProblem(key, error.rule, path.where, error.way_out) from error


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
