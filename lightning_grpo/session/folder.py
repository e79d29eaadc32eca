"""A run's folder: where its files go, and that no other run has it at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_grpo.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L

log = logging.getLogger(__name__)

LOCK = ".lock"
"""Names the process that has the folder; gone with the run, unless that was killed."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: dict[str, FolderLock] = {}
"""Of this process: a lock is the process's, and closing the file a second time would end it."""


class FolderLock:
    """A run's folder, this process's until `release` or until it ends, however it ends.

    The kernel holds it (a POSIX record lock on `.lock`, on most network file systems too), so that
    nothing is left of a run that was killed. Processes that are forked don't inherit it.

    Args:
        folder: Made where it is not there.

    Raises:
        ConfigError: Another process has it, or it can't be written to.

    Attributes:
        folder: As it was given.
        key: The same as every spelling of it comes to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = os.path.realpath(folder)
        self._users = 1
        self._made: list[Path] = []
        try:
            self._made = make_folders(Path(self.key))
            self._file = self._lock()
        except OSError as error:
            self._remove_made()
            raise unusable(folder, error) from error
        except BaseException:
            self._remove_made()
            raise

    def release(self) -> None:
        """Let the folder go; what was made for nothing is removed."""
        self._users -= 1
        if self._users:
            return
        _held.pop(self.key, None)
        with contextlib.suppress(OSError):  # a disk that is gone by now
            Path(self.key, LOCK).unlink()
        os.close(self._file)
        self._remove_made()

    def share(self) -> FolderLock:
        """One more user of the same process."""
        self._users += 1
        return self

    def _lock(self) -> int:
        path = Path(self.key, LOCK)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _take(file, self.folder)
                if _is_at(file, path):  # else whoever had it has just removed it
                    _sign(file, path)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # something is in it, which stays
            for folder in reversed(self._made):
                folder.rmdir()


def hold_folder(folder: Path) -> FolderLock:
    """Take a folder for a run of this process; see `FolderLock`."""
    held = _held.get(os.path.realpath(folder))
    if held is not None:
        return held.share()
    lock = FolderLock(folder)
    _held[lock.key] = lock
    return lock


def hold_new_version(root: Path) -> FolderLock:
    """Make and take the next `version_N` below a folder; of several processes each gets its own."""
    for number in itertools.count(_next_version(root)):
        folder = root / f"version_{number}"
        if folder.exists():
            continue
        try:
            return hold_folder(folder)
        except ConfigError:
            if not (folder / LOCK).exists():
                raise  # not for another run's sake
    raise AssertionError


def hold_run_folder(trainer: L.Trainer) -> FolderLock:
    """Take the folder of a Trainer's run; rank 0 only.

    It is that of the logger which makes one for each run; where there is none (`fast_dev_run`,
    `logger=False`, a service's logger) the next version of the Trainer's folder.
    """
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if isinstance(folder, str | Path):
            return hold_folder(Path(folder))
    root = Path(trainer.default_root_dir)
    if root.absolute() == Path.cwd():  # nobody named one: where Lightning puts its runs
        root = root / "lightning_logs"
    return hold_new_version(root)


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; those that were not there come back, outermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def unusable(folder: Path, error: OSError) -> ConfigError:
    """The refusal of a folder that can't be a run's."""
    why = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        why = "a file is in its place"
    return ConfigError(
        f"`default_root_dir` must be a folder that can be written to, got {str(folder)!r} ({why}). "
        "Name another: `--trainer.default_root_dir` (`run_dir` without a Trainer)."
    )


def _take(file: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            log.warning("%s: no locks here (%s): begin no second run in it", folder, error.strerror)
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        holder = os.read(file, 200).decode("utf-8", "replace").strip() or "another process"
        raise ConfigError(
            f"the run's folder {str(folder)!r} must be one run's alone, and {holder} has it. Wait "
            "for that run or end it. To run beside it, name another folder "
            "(`--trainer.default_root_dir`; `run_dir` without a Trainer), or begin anew without "
            "`--ckpt_path`, which makes one."
        ) from None


def _sign(file: int, path: Path) -> None:
    """Write down whose it is; where the disk is full nobody has it, and nothing is left of it."""
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _next_version(root: Path) -> int:
    numbers = (each.name.removeprefix("version_") for each in root.glob("version_*"))
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
