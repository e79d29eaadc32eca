"""`lightning-grpo fit`: read what was written, refuse what needs no torch to refuse, then run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_grpo.callbacks.early_stop import EarlyStop
from lightning_grpo.cli.sources import ConfigProblem, collect
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.prompts import Source
from lightning_grpo.shipped import resolve_config

if TYPE_CHECKING:
    from lightning_grpo.datamodule import RolloutDataModule


def run(argv: Sequence[str]) -> int:
    """Train; see `lightning-grpo fit --help`."""
    return run_trainer("fit", argv)


def rollouts() -> type[RolloutDataModule]:
    """The data module of a run with servers."""
    from lightning_grpo.datamodule import RolloutDataModule

    return RolloutDataModule


def run_trainer(
    command: str,
    argv: Sequence[str],
    data_class: Callable[[], type[RolloutDataModule]] = rollouts,
    kind: str = "",
) -> int:
    """Run one of the Trainer's entry points.

    Args:
        command: `fit`, `validate` or `test`.
        argv: The command's options.
        data_class: Imports the data module that the config's `data` describes.
        kind: What it is called where it is not training (`replay`).
    """
    early = EarlyStop()
    early.install()
    try:
        _run(command, argv, data_class, kind)
    finally:
        early.uninstall()
    return 0


def _run(
    command: str, argv: Sequence[str], data_class: Callable[[], type[RolloutDataModule]], kind: str
) -> None:
    configs, options = split_configs(argv)
    options = with_paths(configs, options)
    settings = collect(configs, options)
    # Only now: these imports take seconds. The strategy's registers `trainer.strategy: fsdp2`.
    import lightning_grpo.strategies.fsdp2  # noqa: F401
    from lightning_grpo.cli.trainer_cli import run_cli
    from lightning_grpo.module import GRPOModule

    run_cli(command, configs, options, settings, GRPOModule, data_class(), kind)


def split_configs(argv: Sequence[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Take the config files out of the options; the command line always wins over them.

    Returns:
        (name as given, path) of each config, and the other options in order.
    """
    configs: list[tuple[str, Path]] = []
    options: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if name not in ("--config", "-c"):
            options.append(token)
            continue
        if not equals:
            if not rest:
                raise ConfigProblem("--config", "needs the name of a file", "command line")
            value = rest.pop(0)
        configs.append((value, _find(value)))
    return configs, options


def _find(name: str) -> Path:
    """The file itself, or the shipped one of that name."""
    try:
        return Path(resolve_config(name))
    except ConfigError as error:
        raise ConfigProblem("--config", str(error), "command line") from error


def with_paths(configs: Sequence[tuple[str, Path]], options: Sequence[str]) -> list[str]:
    """`--data.prompts rows.csv` as a `path`, where a config or another option has its `column`."""
    data = collect(configs, []).plain().get("data") or {}
    spelled = list(options)
    for place, option in enumerate(options):
        name, equals, text = option.partition("=")
        key = name.removeprefix("--data.")
        text = text if equals else next(iter(options[place + 1 :]), "")
        below = data.get(key, {})
        if key not in ("prompts", "val_prompts", "test_prompts") or not isinstance(below, dict):
            continue
        try:
            Source(text)
        except ValueError:
            continue
        if "path" in below or any(other.startswith(f"{name}.") for other in options):
            spelled[place] = f"{name}.path{equals}{text if equals else ''}"
    return spelled
