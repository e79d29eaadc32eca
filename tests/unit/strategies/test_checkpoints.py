"""Checkpoints are whole or not there, also when the disk is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.strategies.checkpoints import (
    AtomicCheckpointIO,
    replace,
    require_checkpoint,
    require_same_model,
    saved_shapes,
    shapes,
)

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
    told = (
        r"can't be written: (the disk took only a part of it; .*|File too large)\. The one before"
    )
    with full_disk(), pytest.raises(CheckpointError, match=told):
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


# ---- what is refused as a checkpoint, and what it says ------------------------------------------

STATE = {"a.weight": torch.zeros(3, 2), "b": torch.zeros(())}


def test_a_path_where_no_checkpoint_lies_is_refused_with_what_does(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no .*gone\.ckpt'"):
        require_checkpoint(tmp_path / "gone.ckpt")
    with pytest.raises(ConfigError, match=r"folder without meta\.pt\. Checkpoints end in"):
        require_checkpoint(tmp_path)
    file = tmp_path / "version_0" / "checkpoints" / "step=2.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"In it lies .*step=2\.ckpt'"):
        require_checkpoint(tmp_path)
    require_checkpoint(file)
    require_checkpoint("s3://bucket/step=2.ckpt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_torch_can_t_read_is_refused(tmp_path, content):
    path = tmp_path / "step=2.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"step=2\.ckpt' can't be read as a checkpoint: \S"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


def test_weights_alone_and_shards_are_refused_with_the_way_out(tmp_path):
    torch.save(STATE, tmp_path / "weights.ckpt")
    with pytest.raises(ConfigError, match=r"not a checkpoint of a Trainer.*`model\.model`"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "sharded.ckpt" / "meta.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a folder of shards.*`trainer\.strategy: fsdp2`"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "sharded.ckpt")


@pytest.mark.usefixtures("process_group")
def test_shapes_are_read_from_files_and_from_shards(tmp_path):
    checkpoint = {"pytorch-lightning_version": "2.6.6", "state_dict": STATE}
    torch.save(checkpoint, tmp_path / "file.ckpt")
    dcp.save({"state_dict": STATE}, checkpoint_id=tmp_path / "shards.ckpt")
    torch.save({}, tmp_path / "shards.ckpt" / "meta.pt")
    for name in ("file.ckpt", "shards.ckpt"):
        assert saved_shapes(tmp_path / name) == {"a.weight": (3, 2), "b": ()}


def test_another_model_is_named_by_the_first_parameter_that_differs():
    require_same_model(shapes(STATE), shapes(STATE))
    with pytest.raises(ConfigError, match=r"1 parameters differ: b is a scalar .* and absent in"):
        require_same_model(shapes(STATE), {"a.weight": (3, 2)})
    with pytest.raises(ConfigError, match=r"a\.weight is 3x2 in the checkpoint and 4x2 in"):
        require_same_model(shapes(STATE), {"a.weight": (4, 2), "b": ()})
