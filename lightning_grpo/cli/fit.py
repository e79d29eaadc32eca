"""`fit`, `validate`, `test`, `replay`: what a Trainer runs.

What was written is read, and what needs no torch to be refused is refused, before a run begins.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.callbacks.early_stop import EarlyStop
from lightning_grpo.cli.main import import_from
from lightning_grpo.cli.sources import (
    ConfigProblem,
    Setting,
    arguments_in,
    asks_for_help,
    collect,
    helped_class,
    names_class,
    with_helped,
)
from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.rollout.prompts import Source
from lightning_grpo.shipped import resolve_config

_USAGE = """\
usage: lightning-grpo replay --from RUN [--config FILE ...] [options of fit]

Train from the trajectories that a run has written: the same batches, and with the same settings
the same losses, without servers. RUN is the run's folder, its `trajectories/` or one .parquet file.
Without --config the run's own config.yaml is used; every option of `fit` changes it. What a replay
writes goes to a folder beside the run's (runs/quickstart-replay/version_0), also its checkpoints:
`--ckpt_path last` is the last replay's here, and the training's in `fit` and `validate`.

  lightning-grpo replay --from runs/quickstart/version_0
  lightning-grpo replay --from runs/quickstart/version_0 --model.advantage LeaveOneOutAdvantage
"""
_FROM, _CONFIG = "--from", "--config"


def fit(argv: Sequence[str]) -> int:
    """Train; see `lightning-grpo fit --help`."""
    return run_trainer("fit", argv)


def validate(argv: Sequence[str]) -> int:
    """Evaluate on the held-out prompts; takes `fit`'s configs and `--ckpt_path`."""
    return run_trainer("validate", argv)


def test(argv: Sequence[str]) -> int:
    """Evaluate on `data.test_prompts`; takes `fit`'s configs and `--ckpt_path`."""
    return run_trainer("test", argv)


def run_trainer(command: str, argv: Sequence[str], kind: str = "") -> int:
    """Run one of the Trainer's entry points.

    Args:
        command: `fit`, `validate` or `test`.
        argv: The command's options.
        kind: What it is called where it is not training (`replay`).
    """
    early = EarlyStop()
    early.install()
    try:
        _run(command, argv, kind)
    finally:
        early.uninstall()
    return 0


def _run(command: str, argv: Sequence[str], kind: str) -> None:
    configs, options = find_configs(argv)
    options = with_paths(configs, options)
    settings = collect(configs, options)
    options = with_helped(options, settings)
    # Where a class is named, a replay's is among the options.
    replays = kind == "replay" and not names_class(settings.value.get("data"))
    data_class = "ReplayDataModule" if replays else "RolloutDataModule"
    asked = helped_class(options, settings, f"lightning_grpo.{data_class}")
    if asked:  # the parser knows `--data.help` only where `data` names a class
        _run(command, [f"--data={asked}", "--data.help"], kind)
        return
    if not asks_for_help(options):
        # Only now: a file that can't be read needs no parser's import to be told.
        from lightning_grpo.cli.unimported import ROOTS, refuse_at_once, refuse_missing_prompts

        refuse_at_once(settings, {**ROOTS, "data": f"lightning_grpo.{data_class}"})
        if command == "fit" and kind != "replay":
            refuse_missing_prompts(settings, configs)
    # Only now: these imports take seconds. The strategy's registers `trainer.strategy: fsdp2`.
    import lightning_grpo.strategies.fsdp2  # noqa: F401
    from lightning_grpo.cli.trainer_cli import run_cli
    from lightning_grpo.datamodule import ReplayDataModule, RolloutDataModule
    from lightning_grpo.module import GRPOModule

    data = ReplayDataModule if replays else RolloutDataModule
    run_cli(command, configs, options, settings, GRPOModule, data, kind)


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


def find_configs(argv: Sequence[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Take the config files out of the options, and import modules from where they lie, too."""
    configs, options = split_configs(argv)
    import_from(path for name, path in configs if Path(name).is_file())
    return configs, options


def _find(name: str) -> Path:
    """The file itself, or the shipped one of that name."""
    try:
        return Path(resolve_config(name))
    except ConfigError as error:
        raise ConfigProblem("--config", str(error), "command line") from error


def with_paths(configs: Sequence[tuple[str, Path]], options: Sequence[str]) -> list[str]:
    """`--data.prompts rows.csv` as a `path`, where a config or another option has its `column`."""
    data = collect(configs, []).plain().get("data")
    given = arguments_in(data) if isinstance(data, dict) else {}
    spelled = list(options)
    for place, option in enumerate(options):
        name, equals, text = option.partition("=")
        key = name.removeprefix("--data.")
        text = text if equals else next(iter(options[place + 1 :]), "")
        below = given.get(key, {})
        if key not in ("prompts", "val_prompts", "test_prompts") or not isinstance(below, dict):
            continue
        try:
            Source(text)
        except ValueError:
            continue
        if "path" in below or any(other.startswith(f"{name}.") for other in options):
            spelled[place] = f"{name}.path{equals}{text if equals else ''}"
    return spelled


def replay(argv: Sequence[str]) -> int:
    """Train from stored trajectories, without servers."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_USAGE)
        return 0
    recording, options = split_recording(argv)
    if not any(option.partition("=")[0] in (_CONFIG, "-c") for option in options):
        options = [_CONFIG, str(find_config(recording)), *options]
    configs, others = find_configs(options)
    recorded = collect(configs, []).value.get("data")
    if names_class(recorded):
        from lightning_grpo.cli.unimported import ROOTS, refuse_at_once

        # The parser reads its settings, too, and would not say why it can't.
        refuse_at_once(Setting({"data": recorded}, ""), {"data": ROOTS["data"]})
    if names_class(collect(configs, others).value.get("data")):
        options = [*options, "--data", "lightning_grpo.ReplayDataModule"]
    return run_trainer("fit", [*options, "--data.trajectories", str(recording)], "replay")


def split_recording(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """Take `--from` out of the options.

    Raises:
        ConfigProblem: It is missing, or nothing lies there.
    """
    options = [part for word in argv for part in _parts(word)]
    if _FROM not in options[:-1]:
        raise ConfigProblem(_FROM, "needs the folder of a run, or a .parquet file", "command line")
    at = options.index(_FROM)
    recording = Path(options[at + 1])
    if not recording.exists():
        raise ConfigProblem(_FROM, f"must exist, got `{recording}`", "command line")
    return recording, options[:at] + options[at + 2 :]


def find_config(recording: Path) -> Path:
    """The config.yaml of the run that wrote a recording.

    Raises:
        ConfigProblem: There is none.
    """
    from lightning_grpo.rollout.records import trajectory_files

    try:  # of `runs/NAME` those of its last version
        file = trajectory_files(recording)[0]
    except CheckpointError as error:
        raise ConfigProblem(_FROM, str(error), "command line") from error
    for folder in (recording, *list(file.absolute().parents)[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ConfigProblem(
        _CONFIG, f"is needed: there is no config.yaml beside `{recording}`", "command line"
    )


def _parts(word: str) -> list[str]:
    """`--from=RUN` as two words."""
    name, equals, value = word.partition("=")
    return [name, value] if equals and name == _FROM else [word]
