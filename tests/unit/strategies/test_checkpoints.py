"""Checkpoints are whole or not there, also when the disk is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.strategies.checkpoints import AtomicCheckpointIO, replace

SMALL, LARGE = {"step": 1}, {"weights": torch.zeros(1 << 20)}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few kB: the system's own error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_replaces_another_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "run" / "last.ckpt"
    keeper = AtomicCheckpointIO()
    keeper.save_checkpoint(SMALL, path)
    keeper.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_and_the_checkpoint_before_is_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    keeper = AtomicCheckpointIO()
    keeper.save_checkpoint(SMALL, path)
    with full_disk(), pytest.raises(CheckpointError, match=r"can't be written: .*before it is"):
        keeper.save_checkpoint(LARGE, path)
    assert torch.load(path, weights_only=True) == SMALL
    assert list(tmp_path.iterdir()) == [path]


def test_asked_to_continue_it_says_so_and_keeps_older_checkpoints_until_one_is_written(
    tmp_path, caplog
):
    first, second, third = (tmp_path / f"{n}.ckpt" for n in (1, 2, 3))
    keeper = AtomicCheckpointIO("continue")
    keeper.save_checkpoint(SMALL, first)
    with full_disk():
        keeper.save_checkpoint(LARGE, second)
    assert "The run goes on." in caplog.text
    keeper.remove_checkpoint(first)
    assert first.exists()
    keeper.save_checkpoint(SMALL, third)
    keeper.remove_checkpoint(first)
    assert list(tmp_path.iterdir()) == [third]


@pytest.mark.parametrize("before", ["nothing", "file", "folder", "link"])
def test_a_finished_folder_takes_the_place_of_whatever_was_there(tmp_path, before):
    path, partial = tmp_path / "last.ckpt", tmp_path / "partial"
    partial.mkdir()
    (partial / "meta.pt").touch()
    if before == "file":
        path.touch()
    elif before == "folder":
        path.mkdir()
        (path / "old").touch()
    elif before == "link":
        path.symlink_to(tmp_path / "gone")
    replace(partial, path)
    assert [file.name for file in path.iterdir()] == ["meta.pt"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_way_to_fail_is_refused():
    with pytest.raises(ConfigError, match="`on_failure` must be stop or continue, got 'ignore'"):
        AtomicCheckpointIO("ignore")
