"""Mistakes that are told before anything heavy is imported: what constructors accept is read.

The imports of a run take seconds. Which names a constructor takes stands in its source, which is
read in milliseconds, so that a misspelled setting, a missing section, a module and a file that are
not there are told at once. What can't be read for sure (`**kwargs`, a class made by a function) is
left to the parser, which knows the classes themselves.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning_grpo
from lightning_grpo.cli.mistakes import (
    CLASS_KEYS,
    NO_CONFIG,
    Parameter,
    Parameters,
    check_arguments,
    check_init_args,
    import_object,
)
from lightning_grpo.cli.sources import (
    DATASETS,
    ConfigProblem,
    Setting,
    arguments_in,
    holds_datasets,
    is_config,
)
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.prompts import refuse_missing

ROOTS = {
    "trainer": "lightning.pytorch.Trainer",
    "model": "lightning_grpo.GRPOModule",
    "data": "lightning_grpo.RolloutDataModule",
}
"""The class behind each section."""

_MOST_IMPORTS = 20
_NO_BASES = ("ABC", "Generic", "Protocol", "object")
_HARMLESS = ("_defaults_from_env_vars", "final", "override", "runtime_checkable")
"""Decorators that leave what is accepted as it is."""

_DATA = ("Any", "Dict", "Mapping", "dict", "object")
_CONSTRUCTORS = ("__init__", "__new__")


def refuse_at_once(settings: Setting, roots: Mapping[str, str] = ROOTS) -> None:
    """Refuse what is known to be wrong without an import of torch.

    Args:
        settings: Everything that was written.
        roots: The import path of the class behind each section.

    Raises:
        ConfigProblem: The first setting that does not fit.
    """
    for section, path in roots.items():
        accepted = arguments_of(path)
        setting = settings.value.get(section)
        if setting is not None:
            _check(section, setting, accepted, path, is_root=True)
        elif accepted is not None and any(a.required for a in accepted.values()):
            raise ConfigProblem(section, "is missing", "", NO_CONFIG)


def refuse_missing_prompts(settings: Setting, configs: Sequence[tuple[str, Path]]) -> None:
    """Refuse prompts of a file that is not there.

    Args:
        settings: Everything that was written.
        configs: (name as given, path) of each config, beside which it may lie.

    Raises:
        ConfigProblem: Which file.
    """
    data = settings.value.get("data")
    prompts = (
        arguments_in(data.value).get("prompts") if data and isinstance(data.value, dict) else None
    )
    if prompts is None:
        return
    each = {f"data.{DATASETS[0]}": prompts}
    if holds_datasets(prompts):
        each = {f"data.{DATASETS[0]}.{name}": one for name, one in prompts.value.items()}
    for key, setting in each.items():
        if isinstance(setting.value, dict):
            key, setting = f"{key}.path", setting.value.get("path", setting)
        if not isinstance(setting.value, str):
            continue
        try:
            refuse_missing(setting.value)
        except ConfigError as error:
            beside = [p.parent / setting.value for _, p in configs]
            there = next((str(file) for file in beside if file.is_file()), None)
            way_out = f"beside the config there is one: `{there}`" if there else error.way_out
            raise ConfigProblem(key, error.sentence, setting.where, way_out) from error


def _check(
    key: str,
    setting: Setting,
    accepted: Mapping[str, Argument] | None,
    path: str,
    is_root: bool = False,
) -> None:
    """Hold a setting, and what stands in it, against what its class takes."""
    written = setting.value
    if isinstance(written, list):
        for index, each in enumerate(written):
            _check(f"{key}[{index}]", each, None, "")
        return
    if not isinstance(written, dict):
        return
    class_path = written.get("class_path")
    if class_path is not None and isinstance(class_path.value, str):
        path = class_path.value
        package, _, name = path.rpartition(".")
        if package == "lightning_grpo" and name not in lightning_grpo.__all__:
            _import(key, class_path)
        _require_module(key, class_path)
        accepted = arguments_of(path)
        if accepted is not None:
            # What the caller supplies (`params` of an optimizer) is no setting that is missing.
            check_init_args(key, path, _parameters(accepted, False), setting, written)
    elif accepted is not None and CLASS_KEYS.isdisjoint(written):
        name = path.rpartition(".")[2]
        # Of a part a default may hold what its class asks for.
        check_arguments(key, name, _parameters(accepted, is_root), setting, written)
    _check_inner(key, written, accepted or {})


def _check_inner(
    key: str, written: Mapping[str, Setting], accepted: Mapping[str, Argument]
) -> None:
    for name, value in written.items():
        if value.is_carried:
            continue
        if name == "init_args" and isinstance(value.value, dict):
            _check_inner(f"{key}.init_args", value.value, accepted)
            continue
        inner = accepted[name].kind() if name in accepted else None
        if name in accepted and accepted[name].names_functions():
            _require_module(f"{key}.{name}", value)
        if name in accepted and accepted[name].is_data():
            continue
        _check(f"{key}.{name}", value, arguments_of(inner) if inner else None, inner or "")


def _require_module(key: str, setting: Setting) -> None:
    """Refuse import paths into modules that are not there; nothing that is there is imported."""
    written = setting.value
    if isinstance(written, list):
        for index, each in enumerate(written):
            _require_module(f"{key}[{index}]", each)
    elif isinstance(written, dict) and "class_path" not in written:
        for name, each in written.items():
            _require_module(f"{key}.{name}", each)
    elif isinstance(written, str):
        top, dot, _ = written.partition(".")
        if is_config(written):
            return  # the parser reads it
        if dot and top.isidentifier() and top not in sys.modules and not find_spec(top):
            _import(key, setting)


def _import(key: str, setting: Setting) -> None:
    """Fail to, as the parser would."""
    try:
        import_object(setting.value)
    except ConfigProblem as error:
        raise ConfigProblem(key, error.rule, setting.where, error.way_out) from error


def _parameters(accepted: Mapping[str, Argument], required: bool) -> Parameters:
    return Parameters({n: Parameter(Any, required and a.required) for n, a in accepted.items()})


# -- what stands in a source ----------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """One argument of a constructor, as its source has it.

    Attributes:
        required: Whether it has no default.
        annotation: Its type, not evaluated.
        module: Where that stands.
    """

    required: bool
    annotation: ast.expr | None
    module: str

    def kind(self) -> str | None:
        """The import path of the one dataclass that it may be; None where it is anything else."""
        members = list(_members(self.module, self.annotation))
        classes = [each for each in members if not _is_null(each[1])]
        module, node = classes[0] if len(classes) == 1 else ("", None)
        if not isinstance(node, ast.ClassDef) or _dataclass(node) is None:
            return None
        return f"{module}.{node.name}"

    def is_data(self) -> bool:
        """Whether the parser may leave what it holds as it stands, classes' names included."""
        members = [node for _, node in _members(self.module, self.annotation)]
        plain = [each for each in members if isinstance(each, ast.expr) and not _is_null(each)]
        return not members or any(_is_named(each, _DATA) for each in plain)

    def names_functions(self) -> bool:
        """Whether its texts can be nothing but import paths of functions."""
        found = (node for _, node in _members(self.module, self.annotation))
        members = [node for node in found if isinstance(node, ast.expr)]
        plain = [each for each in members if isinstance(each, ast.Name | ast.Attribute)]
        return any(_is_named(each, ("Callable",)) for each in members) and not plain


Arguments = dict[str, Argument]


def arguments_of(path: str) -> Arguments | None:
    """What a class or function accepts; None where its source does not say it for sure.

    Args:
        path: Its import path.
    """
    module, _, name = path.rpartition(".")
    found = _find(module, name) if module else None
    return None if found is None else _accepted(*found)


def _accepted(module: str, node: ast.AST) -> Arguments | None:
    if isinstance(node, ast.ClassDef):
        return _of_class(module, node)
    return _of_function(module, node, skip=0) if isinstance(node, ast.FunctionDef) else None


def _of_class(module: str, node: ast.ClassDef) -> Arguments | None:
    if not _keeps_what_it_decorates(node, ("dataclass",)):
        return None
    bound, options = _names(node), _dataclass(node)
    if "__init__" in bound:
        own = bound["__init__"][0] if len(bound["__init__"]) == 1 else None
        is_plain = isinstance(own, ast.FunctionDef) and own in node.body
        return _of_function(module, own, skip=1) if is_plain else None  # type: ignore[arg-type]
    if options is not None:
        return None if "init" in options else _all_fields(module, node)
    return None if node.keywords or "__new__" in bound else _inherited(module, node)


def _inherited(module: str, node: ast.ClassDef) -> Arguments | None:
    """What a class accepts that has no constructor of its own."""
    bases = list(_bases(module, node))
    if len(bases) > 1 or None in bases:
        return None
    return next((_of_class(*base) for base in bases if base), {})


def _all_fields(module: str, node: ast.ClassDef) -> Arguments | None:
    """The fields of a dataclass and of those that it is derived from."""
    found: Arguments = {}
    for base in reversed(list(_bases(module, node))):
        inherited = _all_fields(*base) if base else None
        if inherited is None:
            return None
        found |= inherited
    if any(isinstance(each, ast.AnnAssign) and each not in node.body for each in _scope(node)):
        return None  # fields below an `if`
    return found | (dict(_fields(module, node)) if _dataclass(node) is not None else {})


def _bases(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef] | None]:
    """The classes that a class is derived from; None for one that is not found."""
    for base in node.bases:
        if _is_named(base, _NO_BASES):
            continue
        found = _find(module, base.id) if isinstance(base, ast.Name) else None
        is_class = found is not None and isinstance(found[1], ast.ClassDef)
        yield found if is_class else None  # type: ignore[misc]


def _of_function(module: str, node: ast.FunctionDef, skip: int) -> Arguments | None:
    given = node.args
    if given.kwarg is not None or not _keeps_what_it_decorates(node):
        return None
    positional = [*given.posonlyargs, *given.args]
    optional = {each.arg for each in positional[len(positional) - len(given.defaults) :]}
    pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    optional |= {each.arg for each, default in pairs if default is not None}
    return {
        each.arg: Argument(each.arg not in optional, each.annotation, module)
        for each in [*positional[skip:], *given.kwonlyargs]
    }


def _dataclass(node: ast.ClassDef) -> list[str] | None:
    """The options that a class is made a dataclass with; None where it is none."""
    for each in node.decorator_list:
        call = each if isinstance(each, ast.Call) else None
        if _is_named(call.func if call else each, ("dataclass",)):
            return [option.arg or "" for option in call.keywords] if call else []
    return None


def _fields(module: str, node: ast.ClassDef) -> Iterator[tuple[str, Argument]]:
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        kind = each.annotation.value if isinstance(each.annotation, ast.Subscript) else None
        options: dict[str | None, ast.expr] = {}
        is_field = isinstance(each.value, ast.Call) and _is_named(each.value.func, ("field",))
        if is_field and isinstance(each.value, ast.Call):
            options = {option.arg: option.value for option in each.value.keywords}
        if _is_named(kind or each.annotation, ("ClassVar", "KW_ONLY")) or "init" in options:
            continue
        has_default = not options.keys().isdisjoint(("default", "default_factory"))
        required = not has_default if is_field else each.value is None
        yield each.target.id, Argument(required, each.annotation, module)


def _keeps_what_it_decorates(
    node: ast.ClassDef | ast.FunctionDef, beside: Sequence[str] = ()
) -> bool:
    """Whether what is defined is what the name will stand for."""
    calls = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return all(_is_named(each, (*_HARMLESS, *beside)) for each in calls)


def _is_named(node: ast.expr, names: Sequence[str]) -> bool:
    """Whether it is one of these names, also behind a module's or with a type in brackets."""
    if isinstance(node, ast.Subscript):
        node = node.value
    last = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
    return last in names


def _members(module: str, annotation: ast.expr | None) -> Iterator[tuple[str, ast.AST]]:
    """The members of `A | B`, each with where it stands; names are looked up as far as known."""
    if isinstance(annotation, ast.BinOp):
        yield from _members(module, annotation.left)
        yield from _members(module, annotation.right)
    elif isinstance(annotation, ast.Name) and (found := _find(module, annotation.id)) is not None:
        place, node = found
        yield from _members(place, node) if isinstance(node, ast.expr) else [found]
    elif annotation is not None:
        yield module, annotation


def _is_null(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _find(module: str, name: str, imports: int = 0) -> tuple[str, ast.AST] | None:
    """Where a name of a module is defined, through the modules that it is imported from.

    Returns:
        (module, a class, a function or what is assigned to it); None where that isn't sure.
    """
    file = _file(module)
    if file is None or imports > _MOST_IMPORTS:
        return None
    bound = _names_in(file, file.stat().st_mtime_ns)
    found = bound.get(name, [])
    node = found[0] if len(found) == 1 else None
    if node is None or any(star.lineno > node.lineno for star in bound.get("*", ())):
        return None
    if isinstance(node, ast.ImportFrom):
        origin = next(each.name for each in node.names if (each.asname or each.name) == name)
        return _find(_absolute(module, file, node), origin, imports + 1)
    is_known = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign)
    return (module, getattr(node, "value", node)) if is_known else None


def _absolute(module: str, file: Path, node: ast.ImportFrom) -> str:
    """The module that a statement imports from."""
    if not node.level:
        return node.module or ""
    up = node.level - (file.name == "__init__.py")
    package = module.split(".")
    return ".".join([*package[: len(package) - up], *filter(None, [node.module])])


Names = dict[str, list[ast.stmt | ast.expr]]


@cache
def _names_in(file: Path, changed_ns: int) -> Names:
    """The names of a module, read once for as long as its source stays as it is."""
    try:
        return _names(ast.parse(file.read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return {}


def _names(scope: ast.AST) -> Names:
    """All that gives each name of a scope its value, or changes how what it names is made."""
    found: Names = {}
    for node in _scope(scope):
        for name in _bound_by(node):
            known = found.setdefault(name, [])
            # The name in a plain assignment is a node, too.
            if not (known and isinstance(known[-1], ast.Assign) and node in known[-1].targets):
                known.append(node)  # type: ignore[arg-type]
    return found


def _bound_by(node: ast.AST) -> list[str]:
    """The names that one node gives a value to."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [each.asname or each.name.partition(".")[0] for each in node.names]
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = node.targets
    else:
        is_read = isinstance(getattr(node, "ctx", None), ast.Load | None)
        is_made = isinstance(node, ast.Attribute) and node.attr in _CONSTRUCTORS
        targets = [] if is_read else [node.value if is_made else node]  # type: ignore
    return [each.id for each in targets if isinstance(each, ast.Name)]


def _scope(scope: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs with a module or a class body, without those of inner functions."""
    waiting = list(ast.iter_child_nodes(scope))[::-1]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += list(ast.iter_child_nodes(node))[::-1]


def _file(module: str) -> Path | None:
    """A module's source, found without importing the packages that it is in."""
    top, *rest = module.split(".")
    found = PathFinder.find_spec(top) if top else None
    if found is None or found.origin is None:
        return None
    file = Path(found.origin)
    for part in rest:
        below = (file.parent / part / "__init__.py", file.parent / f"{part}.py")
        inner = [each for each in below if each.is_file()]
        if file.name != "__init__.py" or not inner:
            return None
        file = inner[0]
    return file if file.suffix == ".py" and file.is_file() else None
