"""What is refused as a checkpoint, and what it says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_grpo.errors import ConfigError
from lightning_grpo.strategies.checkpoints import (
    AtomicCheckpointIO,
    require_checkpoint,
    require_same_model,
    saved_shapes,
    shapes,
)

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
