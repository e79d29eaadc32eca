"""Where each setting of a command line stands: files, options, and problems with a place.

Where each setting was written: YAML files with their lines, then the command line.

jsonargparse forgets lines, so an error message is built from this second, light reading of the
same sources. It also finds what needs no class to be known (a missing file, broken YAML, a key
given twice, an unknown section) before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, ScalarNode, SequenceNode

from lightning_grpo.errors import ConfigError
from lightning_grpo.keys import is_secret
from lightning_grpo.rollout.prompts import FILES, Prompts

_MAX_CHARACTERS = 300


class Parser(argparse.ArgumentParser):
    """A command's own options; what is wrong with them is one message, not the usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise ConfigError(f"{message}\n  `{self.prog} --help` says what there is.")


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that counts: a whole number of `least` or more."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be >= {least}, got {text}")
        return number

    read.__name__ = "whole number"
    return read


class ConfigProblem(ConfigError):
    """One setting that can't work, with its place.

    Args:
        setting: The dotted key; empty for a file as a whole.
        rule: The rule and the value, as the rest of a sentence that begins with the key.
        where: The file and line, or `command line`; empty when nobody wrote it (a default).
        way_out: The nearest valid key, or another way out; may be empty.
    """

    def __init__(self, setting: str, rule: str, where: str = "", way_out: str = "") -> None:
        super().__init__(setting, rule, way_out=way_out)
        self.where = where

    def __str__(self) -> str:
        """Place, rule and way out, each in a line."""
        place = " ".join(filter(None, (self.setting, f"({self.where})" * bool(self.where))))
        rule = one_line(self.rule)
        lines = [place, f"  {rule}"] if place else [rule]
        return "\n".join([*lines, *([f"  {one_line(self.way_out)}"] if self.way_out else [])])


def nearest(key: str, valid: Iterable[str], prefix: str = "", list_all: bool = True) -> str:
    """`did you mean ...?` with the nearest valid key, or the list when none is near.

    Args:
        key: What was written.
        valid: What could have been.
        prefix: Put before the suggestion.
        list_all: Whether to list what is valid when nothing is near.
    """
    names = [name for name in valid if name]
    close = get_close_matches(key, names, n=1, cutoff=0.6)
    starting = [name for name in names if key and name.startswith(key)]
    found = (starting if len(starting) == 1 else close)[:1]
    if found:
        return f"did you mean `{prefix}{found[0]}`?"
    return f"valid here: {', '.join(names)}" if names and list_all else ""


def one_line(text: str) -> str:
    """Text without line breaks, cut where it would fill the screen."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MAX_CHARACTERS else joined[: _MAX_CHARACTERS - 4] + " ..."


SECTIONS = ("seed_everything", "trainer", "model", "data", "ckpt_path", "verbose", "weights_only")
"""The keys at the top of a config; all but the first four are Trainer.fit's own arguments."""

OFTEN_SET = {
    "trainer": (
        *("max_steps", "max_epochs", "devices", "num_nodes", "strategy", "precision"),
        *("accelerator", "logger", "callbacks", "val_check_interval", "gradient_clip_val"),
        "default_root_dir",
    ),
    "model": (
        *("loss", "advantage", "optimizer", "lr_scheduler", "kl", "correction", "lora", "compile"),
        *("truncation", "gradient_checkpointing", "max_tokens_per_microbatch"),
    ),
    "data": (
        *("prompts", "val_prompts", "test_prompts", "workflow", "servers", "batch_size"),
        *("group_size", "max_staleness", "evaluation", "limits", "rollouts_in"),
    ),
}
"""Settings that people write without their section; to ask the classes would take seconds."""

_MOST_VALUES = 100_000

_YAML_TAG = "tag:yaml.org,2002:"
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_CONFIGS = (".yaml", ".yml", ".json")
DATASETS = ("prompts", "val_prompts", "test_prompts")
_OF_ONE = {"class_path", "init_args", *signature(Prompts).parameters}
_SPECIAL = ("config", "c", "help", "h", "print_config")


@dataclass(frozen=True)
class Setting:
    """A value and the place where it was written.

    Attributes:
        value: A scalar, a list of settings, or a dict of settings by key.
        where: `file.yaml, line 7` or `command line`.
        is_carried: Whether it was an argument of another class, which a later source has replaced:
            the parser drops it where the new one does not take it.
    """

    value: Any
    where: str
    is_carried: bool = False

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: setting.plain() for key, setting in self.value.items()}
        if isinstance(self.value, list):
            return [setting.plain() for setting in self.value]
        return self.value

    def walk(self, key: str = "") -> Iterator[tuple[str, Setting]]:
        """Every setting below this one under its dotted key, in the order written."""
        if key:
            yield key, self
        children: Iterator[tuple[Any, Setting]] = iter(())
        if isinstance(self.value, dict):
            children = iter(self.value.items())
        elif isinstance(self.value, list):
            children = iter(enumerate(self.value))
        for name, child in children:
            yield from child.walk(f"{key}.{name}" if key else str(name))


class _Loader(yaml.SafeLoader):
    """Scalars as jsonargparse reads them: `1e-4` is a number."""

    def get_single_node(self) -> yaml.Node | None:
        """The document; refused if its aliases would be laid out as millions of values."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            _refuse_bombs(root)
        return root


def _refuse_bombs(root: yaml.Node) -> None:
    """Count what each node would become, without making it; nodes are shared by their aliases."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in inside:
            said = "an alias must not stand in what it names"
            raise yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark)
        inside.add(id(node))
        if isinstance(node, MappingNode):
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value if isinstance(node, SequenceNode) else []
        total = sizes[id(node)] = 1 + sum(map(size, parts))
        if total > _MOST_VALUES:
            said = f"it holds more than {_MOST_VALUES} values, counting each alias in full"
            raise yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark)
        return total

    size(root)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path, name: str) -> Setting:
    """Read one file with the line of each key.

    Raises:
        ConfigProblem: When it can't be read, is not YAML, or gives a key twice.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"), name)
    except OSError as error:
        raise ConfigProblem("--config", f"can't read `{name}`: {error.strerror}", name) from error
    except UnicodeDecodeError as error:
        rule = f"must be text in UTF-8, and byte {error.start} is not: save it as UTF-8"
        raise ConfigProblem("", rule, name) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigProblem("", f"is not valid YAML: {said}", f"{name}, line {line}") from error
    except yaml.YAMLError as error:
        raise ConfigProblem("", f"is not valid YAML: {error}", name) from error
    except RecursionError as error:
        raise ConfigProblem("", "holds itself, or values too deep in one another", name) from error


def _parse(text: str, name: str) -> Setting:
    """A file's text as settings; what YAML does not take raises its own errors."""
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return Setting({}, name)
    if not isinstance(node, MappingNode):
        raise ConfigProblem("", "must hold `key: value` pairs at its top", name)
    return _convert(node, loader, name, "")


def _convert(node: yaml.Node, loader: _Loader, name: str, key: str) -> Setting:
    """A YAML node as a setting."""
    where = f"{name}, line {node.start_mark.line + 1}"
    if node.tag not in _Loader.yaml_constructors:
        rule = f"must be written without the tag `{node.tag.replace(_YAML_TAG, '!!')}`"
        raise ConfigProblem(key, rule, where, "Configs hold plain values; put the value itself.")
    if isinstance(node, ScalarNode):
        try:
            return Setting(loader.construct_object(node), where)
        except ValueError as error:  # a date or a number that there is not
            raise ConfigProblem(key, f"is not valid YAML: {error}", where) from error
    if isinstance(node, SequenceNode):
        items = [_convert(v, loader, name, f"{key}[{i}]") for i, v in enumerate(node.value)]
        return Setting(items, where)
    _refuse_duplicates(node, name, key)
    loader.flatten_mapping(node)
    values: dict[str, Setting] = {}
    for child_key, child in node.value:
        written = str(child_key.value)
        value = _convert(child, loader, name, f"{key}.{written}" if key else written)
        values[written] = Setting(value.value, f"{name}, line {child_key.start_mark.line + 1}")
    return Setting(values, where)


def _refuse_duplicates(node: MappingNode, name: str, key: str) -> None:
    """YAML would silently keep the last of two equal keys."""
    first: dict[str, int] = {}
    for child_key, _ in node.value:
        line = child_key.start_mark.line + 1
        written = str(child_key.value)
        if written in first and written != "<<":
            dotted = f"{key}.{written}" if key else written
            rule = f"is given twice (first in line {first[written]}): keep one"
            raise ConfigProblem(dotted, rule, f"{name}, line {line}")
        first.setdefault(written, line)


def read_options(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """`--a.b=1 --c 2` as (key, text) pairs; an option without a value has None."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token == "-c":
            token = "--config"
        if not token.startswith("--"):
            if token.startswith("-") and token[1:] in _SPECIAL:
                pairs.append((token[1:], None))
                continue
            rule, way_out = "is not an option: options begin with `--`", ""
            if Path(token).suffix in (".yaml", ".yml"):
                way_out = f"did you mean `--config {token}`?"
            raise ConfigProblem(token, rule, "command line", way_out)
        key, equals, text = token[2:].partition("=")
        if equals:
            pairs.append((key, text))
        elif rest and not rest[0].startswith("--"):
            pairs.append((key, rest.pop(0)))
        else:
            pairs.append((key, None))
    return pairs


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the parser ends the process itself: after a help text, or the config."""
    names = [argument.partition("=")[0].lstrip("-") for argument in arguments]
    return any(n in ("h", "help", "print_config") or n.endswith(".help") for n in names)


def _refuse_secrets(key: str, written: Any) -> None:
    """Refuse a key or a token on the command line, also inside of a value that holds several."""
    value = written.value if isinstance(written, Setting) else written
    holds_more = isinstance(value, dict | list)
    # Of digits alone, a key is read as a number.
    said = value if value is None or isinstance(value, bool) or holds_more else str(value)
    if is_secret(key.rpartition(".")[2], said):
        raise ConfigProblem(
            key,
            "must not stand on the command line, which every user of this machine can read: "
            "give `env:NAME` or `file:PATH`, or write it in a config",
            "command line",
        )
    if isinstance(value, dict):
        for name, child in value.items():
            _refuse_secrets(f"{key}.{name}", child)
    elif isinstance(value, list):
        for child in value:
            _refuse_secrets(key, child)


def collect(configs: Sequence[tuple[str, Path]], arguments: Sequence[str]) -> Setting:
    """Everything that was written, later sources over earlier ones.

    Args:
        configs: (name as given, path) of each config file, in order.
        arguments: The command line's other options.
    """
    merged = Setting({}, "")
    for name, path in configs:
        merged = merge(merged, read_yaml(path, name))
    for key, text in read_options(arguments):
        first = key.split(".")[0]
        if key in _SPECIAL or first == "print_config" or key.endswith(".help"):
            continue
        setting = Setting(text if text is None else _scalar(text), "command line")
        _refuse_secrets(key.removesuffix("+"), setting)
        if key.endswith("+"):
            key, setting = key[:-1], Setting([setting], "command line")
        for part in reversed(key.split(".")):
            setting = Setting({part: setting}, "command line")
        merged = merge(merged, setting)
    refuse_unknown_sections(merged)
    return merged


def _scalar(text: str) -> Any:
    """A command-line text as YAML reads it (containers become settings of the command line)."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return text
        return _relabel(_convert(node, loader, "command line", "")).value
    except (yaml.YAMLError, RecursionError):
        return text


def _relabel(setting: Setting) -> Setting:
    """The same, all of it from the command line."""
    if isinstance(setting.value, dict):
        value: Any = {key: _relabel(child) for key, child in setting.value.items()}
    elif isinstance(setting.value, list):
        value = [_relabel(child) for child in setting.value]
    else:
        value = setting.value
    return Setting(value, "command line")


def merge(base: Setting, over: Setting) -> Setting:
    """`over` laid on `base`: keys are joined, a class path keeps the arguments given before.

    Another text (a file, an address) takes the place of all that was given before.
    """
    if isinstance(base.value, list) and base.value and isinstance(over.value, dict):
        # As jsonargparse: `--trainer.callbacks.monitor x` is about the last callback of the list.
        return Setting([*base.value[:-1], merge(base.value[-1], over)], base.where)
    if _is_class_path(base.value) and isinstance(over.value, dict):
        base = Setting({"class_path": base}, base.where)
    if isinstance(base.value, dict) and _is_class_path(over.value):
        over = Setting({"class_path": over}, over.where)
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    values = _carried(base.value, over.value)
    inner = over.value.get("init_args")
    if inner is not None and isinstance(inner.value, dict):
        # An argument stands in one place: what is beside the class goes to where `over` has it.
        beside = {key: values.pop(key) for key in inner.value if key in values}
        before = values.get("init_args", Setting({}, inner.where))
        if beside and isinstance(before.value, dict):
            values["init_args"] = replace(before, value={**before.value, **beside})
    for key, child in over.value.items():
        alike = key not in DATASETS or holds_datasets(values.get(key)) == holds_datasets(child)
        values[key] = merge(values[key], child) if key in values and alike else child
    return Setting(values, base.where or over.where)


def _carried(base: Mapping[str, Setting], over: Mapping[str, Setting]) -> dict[str, Setting]:
    """What is left of `base`: as it is, unless `over` names another class than it did."""
    nothing = Setting(None, "")
    before, after = (each.get("class_path", nothing).value for each in (base, over))
    if after in (None, before):
        return dict(base)
    left = {key: replace(child, is_carried=key != "init_args") for key, child in base.items()}
    inner = base.get("init_args")
    if inner is not None and isinstance(inner.value, dict):
        arguments = {key: replace(child, is_carried=True) for key, child in inner.value.items()}
        left["init_args"] = replace(inner, value=arguments)
    return left


def arguments_in(written: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class as written: below `init_args`, or beside `class_path`, or alone."""
    inner = written.get("init_args")
    inner = inner.value if isinstance(inner, Setting) else inner
    beside = {name: v for name, v in written.items() if name not in ("class_path", "init_args")}
    return {**(inner if isinstance(inner, dict) else {}), **beside}


def names_class(section: Setting | None) -> bool:
    """Whether a section names the class that it makes."""
    written = section.value if section is not None else None
    return "class_path" in written if isinstance(written, dict) else _is_class_path(written)


def with_helped(options: Sequence[str], settings: Setting) -> list[str]:
    """`--data.help` as `--data.help=mine.X`, where the section's class is X."""
    spelled = list(options)
    for place, option in enumerate(options):
        section, dot, rest = option.removeprefix("--").partition(".")
        alone = next(iter(options[place + 1 :]), "--").startswith("--")
        named = settings.value.get(section)
        if (dot, rest) == (".", "help") and alone and names_class(named):
            written = named.plain()
            path = written["class_path"] if isinstance(written, dict) else written
            spelled[place] = f"{option}={path}"
    return spelled


def helped_class(options: Sequence[str], settings: Setting, default: str) -> str:
    """Whose help `--data.help` or `--data.help CLASS` asks for where `data` names none; or ""."""
    asked = next((o for o in options if o.partition("=")[0] == "--data.help"), None)
    if asked is None or names_class(settings.value.get("data")):
        return ""
    given = asked.partition("=")[2] or next(iter(options[options.index(asked) + 1 :]), "")
    return given if _is_class_path(given) else default


def holds_datasets(setting: Setting | None) -> bool:
    """Whether it holds datasets by name, and no settings of one."""
    written = setting.value if setting is not None else None
    return isinstance(written, dict) and bool(written) and not _OF_ONE & written.keys()


def _is_class_path(value: Any) -> bool:
    """Whether it may name a class, and is no file or address."""
    is_name = isinstance(value, str) and _CLASS_PATH.fullmatch(value) is not None
    return is_name and Path(value).suffix.lower() not in (*FILES, *_CONFIGS)


def is_config(value: Any) -> bool:
    """Whether it names a file with the settings, as the parser takes it for any component."""
    return isinstance(value, str) and Path(value).suffix in _CONFIGS and Path(value).is_file()


def refuse_unknown_sections(settings: Setting) -> None:
    """Refuse what is not one of the top-level keys, before anything heavy is imported."""
    for key, setting in settings.value.items():
        if key not in SECTIONS:
            rule = f"is not a section of a config ({', '.join(SECTIONS[:4])})"
            owners = [name for name, often in OFTEN_SET.items() if key in often]
            meant = f"did you mean `{owners[0]}.{key}`?" if owners else nearest(key, SECTIONS)
            raise ConfigProblem(key, rule, setting.where, meant)
        if key in SECTIONS[1:4] and isinstance(setting.value, bool | int | float | list):
            rule = f"must hold settings (`{key}: {{name: value}}`), got {setting.plain()}"
            raise ConfigProblem(key, rule, setting.where)
