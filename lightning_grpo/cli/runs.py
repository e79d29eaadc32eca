"""Run folders: `runs/NAME/version_N`, with the loggers in them, and going on in the last one."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache

RUNS = "runs"
_METRICS = "metrics.csv"


def last_checkpoint(root: Path) -> Path | None:
    """The checkpoint that `--ckpt_path last` means: the newest below `root`, if there is one.

    Lightning looks in the new run's own folder, which is empty. A run that a signal stopped has
    left its last one in `root` itself.
    """
    found = [*root.glob("version_*/checkpoints/*.ckpt"), *root.glob("hpc_ckpt_*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def version_of(checkpoint: Path) -> int:
    """The N of the `version_N` folder that a checkpoint lies in, or that a signal stopped."""
    folder = checkpoint.parent.parent.name
    if folder.startswith("version_"):
        return int(folder.removeprefix("version_"))
    versions = [int(p.name.removeprefix("version_")) for p in checkpoint.parent.glob("version_*")]
    return max(versions, default=0)


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
    made = set(folder.glob("events.out.tfevents.*")) | set(empty)
    if folder.is_dir() and set(folder.iterdir()) <= made:
        shutil.rmtree(folder)


def _keep_metrics(folder: Path) -> None:
    """Put the metrics so far aside: Lightning's CSVLogger would delete them, with a warning."""
    metrics = folder / _METRICS
    if metrics.exists():
        parts = len(list(folder.glob("metrics-*.csv")))
        metrics.rename(folder / f"metrics-{parts}.csv")
    warnings.filterwarnings("ignore", message="Experiment logs directory", category=UserWarning)
