"""Run folders: `runs/NAME/version_N`, with the loggers in them, and going on in the last one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache

from lightning_grpo.errors import ConfigError
from lightning_grpo.strategies.restoring import is_sharded

RUNS = "runs"
LAST = "last"
LAST_OR_NONE = "last-or-none"
"""Spellings of `--ckpt_path`: the newest checkpoint, and the same where there may be none yet."""
_METRICS = "metrics.csv"
_VERSION = "version_"


def last_checkpoint(root: Path, folders: Iterable[Path] = ()) -> Path | None:
    """The checkpoint that `--ckpt_path last` means: the newest below `root`, if there is one.

    Lightning looks in the new run's own folder, which is empty. A run that a signal stopped has
    left its last one in `root` itself, one without a logger in `root/checkpoints`.

    Args:
        root: The folder of the run's versions.
        folders: Others that checkpoints of this run go to.
    """
    own = (root / "checkpoints", *root.glob("version_*/checkpoints"), *folders)
    # A metric's name in `filename` may hold a slash, which makes a folder.
    found = {
        *root.glob("hpc_ckpt_*.ckpt"),
        *(path for each in own for path in each.rglob("*.ckpt")),
    }
    whole = [path for path in found if path.is_file() or is_sharded(path)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def version_of(checkpoint: Path, root: Path | None = None) -> int:
    """The N of the `version_N` folder that a checkpoint belongs to.

    Args:
        checkpoint: Somewhere in the folder, or elsewhere: then it belongs to the newest version.
        root: The folder of the run's versions; None: the checkpoint lies in it.
    """
    for folder in checkpoint.parents:
        if folder.name.startswith(_VERSION):
            return _number(folder)
    return max(map(_number, (root or checkpoint.parent).glob(f"{_VERSION}*")), default=0)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(_VERSION))


def default_loggers(root: Path, version: int | None = None) -> list[Logger]:
    """A CSV file, and TensorBoard where it is installed, in one `version_N` folder.

    Args:
        root: The folder of the run's versions.
        version: The version to go on with; None starts a new one.
    """
    # Every row at once: a run that is killed keeps its curve.
    csv = CSVLogger(root, name="", version=version, flush_logs_every_n_steps=1)
    if version is not None:
        _keep_metrics(Path(csv.log_dir))
    loggers: list[Logger] = [csv]
    if RequirementCache("tensorboard"):
        loggers.append(TensorBoardLogger(root, name="", version=csv.version))
    return loggers


def remove_unused(folder: Path) -> None:
    """Remove the folder of a run that never began: loggers have made it, and nothing is in it."""
    empty = [folder / _METRICS, folder / "config.yaml", folder / "hparams.yaml"]
    # Servers may have been started before the refusal: their logs say nothing of it.
    made = {*folder.glob("events.out.tfevents.*"), *empty, folder / "servers"}
    if folder.is_dir() and set(folder.iterdir()) <= made:
        shutil.rmtree(folder)


def require_folder(folder: Path) -> list[Path]:
    """Refuse a run's folder that can't be made, or written into.

    Returns:
        The folders that have to be made for it, innermost first; none of them is there yet.

    Raises:
        ConfigError: What the system says.
    """
    missing: list[Path] = []
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            "`trainer.default_root_dir` must be a folder to write into, got "
            f"{str(folder)!r}: {error.strerror}. Name another one."
        ) from error
    finally:
        remove_empty(missing)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders, innermost first, that nothing is in."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _keep_metrics(folder: Path) -> None:
    """Put the metrics so far aside: Lightning's CSVLogger would delete them, with a warning."""
    metrics = folder / _METRICS
    if metrics.exists():
        parts = len(list(folder.glob("metrics-*.csv")))
        metrics.rename(folder / f"metrics-{parts}.csv")
    warnings.filterwarnings("ignore", message="Experiment logs directory", category=UserWarning)
