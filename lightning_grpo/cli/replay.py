"""`lightning-grpo replay --from RUN`: train from stored trajectories, without servers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_grpo.cli.fit import run_trainer
from lightning_grpo.cli.sources import ConfigProblem
from lightning_grpo.errors import CheckpointError

if TYPE_CHECKING:
    from lightning_grpo.datamodule import RolloutDataModule

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


def run(argv: Sequence[str]) -> int:
    """Replay."""
    if not argv or "-h" in argv or "--help" in argv:
        sys.stdout.write(_USAGE)
        return 0
    recording, options = split_recording(argv)
    if not any(option.partition("=")[0] in (_CONFIG, "-c") for option in options):
        options = [_CONFIG, str(find_config(recording)), *options]
    return run_trainer("fit", [*options, "--data.trajectories", str(recording)], replay, "replay")


def replay() -> type[RolloutDataModule]:
    """The data module of a run without servers."""
    from lightning_grpo.datamodule import ReplayDataModule

    return ReplayDataModule


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
