"""Checkpoints that were made to run a program when they are read."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_grpo.errors import ConfigError
from lightning_grpo.strategies.checkpoints import (
    AtomicCheckpointIO,
    forget_foreign_paths,
    load_shards,
    reading,
    saved_shapes,
    whole_state,
)

pytestmark = pytest.mark.usefixtures("process_group")

STATE = {"state_dict": {"a": torch.arange(3.0)}, "optimizer_0": {"lr": 0.5, "betas": (0.9, 0.95)}}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "step=2.ckpt"
    dcp.save(STATE, checkpoint_id=folder)
    torch.save({"pytorch-lightning_version": "2.6.6"}, folder / "meta.pt")
    return folder


def readers():
    return {
        "shapes": saved_shapes,
        "resuming": lambda path: load_shards({"state_dict": {"a": torch.zeros(3)}}, path),
        "exporting": whole_state,
    }


@pytest.mark.parametrize("reader", readers())
def test_an_index_that_would_run_a_program_is_refused_before_it_runs(shards, tmp_path, reader):
    (shards / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with (
        pytest.raises(ConfigError, match=r"can't be read .*`pathlib.*touch.*nothing of it was run"),
        reading(shards),
    ):
        readers()[reader](shards)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("reader", readers())
def test_what_an_index_hides_in_its_fields_is_refused(shards, tmp_path, reader):
    metadata = dcp.FileSystemReader(shards).read_metadata()
    metadata.planner_data = {"state_dict.a": Touch(tmp_path / "ran")}
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="nothing of it was run"), reading(shards):
        readers()[reader](shards)
    assert not (tmp_path / "ran").exists()


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
def test_an_index_that_is_none_is_refused_in_one_sentence(shards, content, reader, caplog):
    (shards / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError, match="can't be read as a checkpoint: "), reading(shards):
        readers()[reader](shards)
    assert not caplog.records


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


def test_what_lies_beside_the_shards_is_read_as_data(shards, tmp_path):
    torch.save({"x": Touch(tmp_path / "ran")}, shards / "meta.pt")
    with pytest.raises(ConfigError, match="can't be read as a checkpoint: "), reading(shards):
        whole_state(shards)
    assert not (tmp_path / "ran").exists()


def test_checkpoints_of_ours_are_read_as_ever(shards):
    state = {"state_dict": {"a": torch.zeros(3)}, "optimizer_0": {"lr": 0.0, "betas": ()}}
    load_shards(state, shards)
    assert torch.equal(state["state_dict"]["a"], torch.arange(3.0))
    assert state["optimizer_0"] == STATE["optimizer_0"]
    whole = whole_state(shards)
    assert torch.equal(whole["state_dict"]["a"], torch.arange(3.0))
    assert whole["optimizer_0"] == {"lr": 0.5, "betas": (0.9, 0.95)}


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
def test_what_a_stranger_s_checkpoint_calls_older_ones_is_forgotten(foreign):
    state = {"best_model_path": foreign, "best_k_models": {foreign: 1.0, "/runs/a/1.ckpt": 2.0}}
    checkpoint = {"callbacks": {"ModelCheckpoint": state, "Other": {"x": 1}}}
    forget_foreign_paths(checkpoint, ["/runs/a"])
    assert state == {"best_model_path": "", "best_k_models": {"/runs/a/1.ckpt": 2.0}}


@pytest.mark.parametrize(
    "path", ["/runs/a/1.ckpt", "runs/b/1.ckpt", "s3://bucket/a/1.ckpt", "/odd:name/1.ckpt", ""]
)
def test_what_a_checkpoint_of_the_same_run_calls_older_ones_is_kept(path):
    state = {"best_model_path": path, "last_model_path": path, "best_k_models": {path: 1.0}}
    kept = {**state, "best_k_models": dict(state["best_k_models"])}
    forget_foreign_paths({"callbacks": {"a": state}}, ["/runs/a", "s3://bucket/a", "/odd:name"])
    assert state == kept
