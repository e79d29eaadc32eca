import resource
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lightning_grpo.errors import ConfigError, WeightSyncError
from lightning_grpo.session.assembly import choose_transport
from lightning_grpo.weights.process_group import (
    DirectTransport,
    IPCTransport,
    ProcessGroupTransport,
)
from lightning_grpo.weights.transport import DiskTransport, Place, write_version


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("old weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "inner").mkdir()
    return folder


def weights(value):
    return {"a": torch.full((3, 2), float(value)), "b": torch.arange(4.0).reshape(2, 2).t()}


def test_a_version_is_a_complete_model_folder(tmp_path, base):
    folder, num_bytes = write_version(tmp_path / "weights", 12, weights(1), base)
    assert folder.name == "v000012"
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert num_bytes == (folder / "model.safetensors").stat().st_size
    loaded = load_file(folder / "model.safetensors")
    for name, tensor in weights(1).items():
        assert torch.equal(loaded[name], tensor)
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["v000012"]


def test_the_last_two_versions_stay(tmp_path, base):
    transport = DiskTransport()
    transport.bind(Place(tmp_path, base))
    for version in range(5):
        assert transport.prepare(weights(version), version) > 0
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["v000003", "v000004"]


def test_a_version_may_be_written_again(tmp_path, base):
    transport = DiskTransport(str(tmp_path / "elsewhere"), keep=1)
    transport.bind(Place(tmp_path, base))
    transport.prepare(weights(1), 7)
    transport.prepare(weights(2), 7)
    (folder,) = (tmp_path / "elsewhere").iterdir()
    assert load_file(folder / "model.safetensors")["a"][0, 0] == 2


def test_a_crash_in_the_middle_leaves_nothing_that_looks_finished(tmp_path, base):
    (tmp_path / "weights" / "v000003.partial").mkdir(parents=True)
    transport = DiskTransport()
    transport.bind(Place(tmp_path, base))
    transport.prepare(weights(1), 3)
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["v000003"]


def test_a_folder_that_cannot_be_written_names_the_way_out(tmp_path, base):
    (tmp_path / "full").write_text("")
    transport = DiskTransport(str(tmp_path / "full"))
    transport.bind(Place(tmp_path, base))
    with pytest.raises(WeightSyncError, match="another folder"):
        transport.prepare(weights(1), 1)


def test_a_model_that_is_no_folder_here_has_no_companions(tmp_path):
    transport = DiskTransport()
    transport.bind(Place(tmp_path, tmp_path / "not" / "there"))
    transport.prepare(weights(1), 1)
    (written,) = (tmp_path / "weights" / "v000001").iterdir()
    assert written.name == "model.safetensors"


def test_a_disk_that_takes_no_more_is_named_and_left_as_it_was(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(WeightSyncError, match=r"could not be written to .*Free space there"):
            write_version(tmp_path, 1, {"a": torch.zeros(1 << 20)}, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_keeping_none_is_refused():
    with pytest.raises(ConfigError, match="`keep` must be >= 1"):
        DiskTransport(keep=0)


# ---- choose -------------------------------------------------------------------------------------


def servers_on(*devices):
    return SimpleNamespace(handles=[SimpleNamespace(devices=(each,)) for each in devices])


@pytest.mark.parametrize(
    ("trainer_gpu", "serving", "kind"),
    [
        (0, (0,), IPCTransport),
        (0, (1,), DirectTransport),
        (0, (1, 2, 3), DirectTransport),
        (1, (0, 1), DiskTransport),
        (0, (), DirectTransport),
        (None, (), ProcessGroupTransport),
    ],
)
def test_the_transport_follows_from_where_trainer_and_servers_are(trainer_gpu, serving, kind):
    assert type(choose_transport(None, servers_on(*serving), trainer_gpu)) is kind


def test_a_server_on_a_cpu_beside_a_trainer_on_a_gpu_joins_a_group_of_the_cpus():
    # Of a running server that is local the only GPU is known, not whether it uses it.
    chosen = choose_transport(None, servers_on(0), 0, on_cpu=True)
    assert isinstance(chosen, ProcessGroupTransport)
    assert chosen.backend == "gloo"


def test_a_given_transport_is_kept():
    given = DiskTransport()
    assert choose_transport(given, servers_on(0), 0) is given
