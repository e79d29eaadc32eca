"""Checkpoints are whole or not there, also when the disk is full."""

from __future__ import annotations

import io
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.strategies.checkpoints import (
    AtomicCheckpointIO,
    forget_foreign_paths,
    load_shards,
    reading,
    replace,
    require_checkpoint,
    require_same_model,
    saved_shapes,
    shapes,
    whole_state,
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


# -- checkpoints that were made to run a program when they are read --------------------------------


IN_A_GROUP = pytest.mark.usefixtures("process_group")
HOSTILE_STATE = {
    "state_dict": {"a": torch.arange(3.0)},
    "optimizer_0": {"lr": 0.5, "betas": (0.9, 0.95)},
}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "step=2.ckpt"
    dcp.save(HOSTILE_STATE, checkpoint_id=folder)
    torch.save({"pytorch-lightning_version": "2.6.6"}, folder / "meta.pt")
    return folder


def readers():
    return {
        "shapes": saved_shapes,
        "resuming": lambda path: load_shards({"state_dict": {"a": torch.zeros(3)}}, path),
        "exporting": whole_state,
    }


@IN_A_GROUP
@pytest.mark.parametrize("reader", readers())
def test_an_index_that_would_run_a_program_is_refused_before_it_runs(shards, tmp_path, reader):
    (shards / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with (
        pytest.raises(ConfigError, match=r"can't be read .*`pathlib.*touch.*nothing of it was run"),
        reading(shards),
    ):
        readers()[reader](shards)
    assert not (tmp_path / "ran").exists()


@IN_A_GROUP
@pytest.mark.parametrize("reader", readers())
def test_what_an_index_hides_in_its_fields_is_refused(shards, tmp_path, reader):
    metadata = dcp.FileSystemReader(shards).read_metadata()
    metadata.planner_data = {"state_dict.a": Touch(tmp_path / "ran")}
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="nothing of it was run"), reading(shards):
        readers()[reader](shards)
    assert not (tmp_path / "ran").exists()


@IN_A_GROUP
def test_an_index_that_points_out_of_its_folder_is_refused(shards):
    metadata = dcp.FileSystemReader(shards).read_metadata()
    for stored in metadata.storage_data.values():
        stored.relative_path = f"../{shards.name}/{stored.relative_path}"
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="a file outside of its folder"), reading(shards):
        whole_state(shards)


@pytest.mark.parametrize("reader", readers())
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1})),
        b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little"),  # an exabyte is to follow
    ],
)
@IN_A_GROUP
def test_an_index_that_is_none_is_refused_in_one_sentence(shards, content, reader, caplog):
    (shards / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError, match="can't be read as a checkpoint: "), reading(shards):
        readers()[reader](shards)
    assert not caplog.records


@IN_A_GROUP
@pytest.mark.parametrize("reader", ["resuming", "exporting"])
def test_an_optimizer_s_setting_that_would_run_a_program_is_refused(tmp_path, reader):
    folder = tmp_path / "step=2.ckpt"
    dcp.save({"a": 1.0, "b": Touch(tmp_path / "ran")}, checkpoint_id=folder)
    torch.save({}, folder / "meta.pt")
    assert not (tmp_path / "ran").exists()
    read = {"resuming": lambda path: load_shards({"b": 0}, path), "exporting": whole_state}[reader]
    with pytest.raises(ConfigError, match="can't be read as a checkpoint: "), reading(folder):
        read(folder)
    assert not (tmp_path / "ran").exists()


@IN_A_GROUP
def test_what_lies_beside_the_shards_is_read_as_data(shards, tmp_path):
    torch.save({"x": Touch(tmp_path / "ran")}, shards / "meta.pt")
    with pytest.raises(ConfigError, match="can't be read as a checkpoint: "), reading(shards):
        whole_state(shards)
    assert not (tmp_path / "ran").exists()


@IN_A_GROUP
def test_checkpoints_of_ours_are_read_as_ever(shards):
    state = {"state_dict": {"a": torch.zeros(3)}, "optimizer_0": {"lr": 0.0, "betas": ()}}
    load_shards(state, shards)
    assert torch.equal(state["state_dict"]["a"], torch.arange(3.0))
    assert state["optimizer_0"] == HOSTILE_STATE["optimizer_0"]
    whole = whole_state(shards)
    assert torch.equal(whole["state_dict"]["a"], torch.arange(3.0))
    assert whole["optimizer_0"] == {"lr": 0.5, "betas": (0.9, 0.95)}


@IN_A_GROUP
def test_a_file_is_read_as_data_from_wherever_it_comes(tmp_path):
    content = io.BytesIO()
    torch.save({"pytorch-lightning_version": "2.6.6", "x": Touch(tmp_path / "ran")}, content)
    (tmp_path / "a.ckpt").write_bytes(content.getvalue())
    for path in (tmp_path / "a.ckpt", f"file://{tmp_path}/a.ckpt"):
        with pytest.raises(ConfigError, match=r"it names `getattr`, .*nothing of it was run. Name"):
            AtomicCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "foreign",
    ["/runs/a/../../home", "local:///home", "local:/home", "/runs/a/x::local:///home", 5, None],
)
@IN_A_GROUP
def test_what_a_stranger_s_checkpoint_calls_older_ones_is_forgotten(foreign):
    state = {"best_model_path": foreign, "best_k_models": {foreign: 1.0, "/runs/a/1.ckpt": 2.0}}
    checkpoint = {"callbacks": {"ModelCheckpoint": state, "Other": {"x": 1}}}
    forget_foreign_paths(checkpoint, ["/runs/a"])
    assert state == {"best_model_path": "", "best_k_models": {"/runs/a/1.ckpt": 2.0}}


@pytest.mark.parametrize(
    "path", ["/runs/a/1.ckpt", "runs/b/1.ckpt", "s3://bucket/a/1.ckpt", "/odd:name/1.ckpt", ""]
)
@IN_A_GROUP
def test_what_a_checkpoint_of_the_same_run_calls_older_ones_is_kept(path):
    state = {"best_model_path": path, "last_model_path": path, "best_k_models": {path: 1.0}}
    kept = {**state, "best_k_models": dict(state["best_k_models"])}
    forget_foreign_paths({"callbacks": {"a": state}}, ["/runs/a", "s3://bucket/a", "/odd:name"])
    assert state == kept
