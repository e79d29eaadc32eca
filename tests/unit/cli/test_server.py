from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch.distributed.checkpoint import FileSystemWriter, save

from lightning_grpo.cli.folders import build_module, check_paths, read_checkpoint
from lightning_grpo.cli.launch import engine_command
from lightning_grpo.cli.main import main
from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.rollout.prompts import open_rows
from lightning_grpo.servers.sglang import ServerPython, resolve_python


def test_serve_is_the_engines_own_command_line():
    assert engine_command(["some/folder", "--port", "30000"]) == [
        sys.executable, "-m", "lightning_grpo.engine", "--model", "some/folder", "--port", "30000",
    ]  # fmt: skip


def test_serve_passes_a_named_model_through():
    assert engine_command(["--model", "x"])[3:] == ["--model", "x"]


def test_serving_what_is_not_shipped_is_a_mistake(capsys):
    assert main(["serve", "shipped:nothing"]) == 2
    assert "Nothing ships as 'shipped:nothing'" in capsys.readouterr().err


def test_exporting_from_nowhere_is_refused_at_once(capsys):
    assert main(["export", "nowhere.ckpt", "out"]) == 2
    assert "`checkpoint` must exist, got 'nowhere.ckpt'" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    checkpoint = tmp_path / "a.ckpt"
    checkpoint.touch()
    with pytest.raises(ConfigError, match="`out` must be a new or empty folder"):
        check_paths(checkpoint, tmp_path)


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_an_export_to_where_nothing_can_be_written_is_refused_at_once(below, tmp_path):
    (tmp_path / "file").touch()
    checkpoint = tmp_path / "file"
    with pytest.raises(ConfigError, match="`out` must be in a folder that can be written to"):
        check_paths(checkpoint, tmp_path / below / "out")


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint file nor a folder of shards"):
        read_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, capsys):
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_bytes(b"garbage")
    assert main(["export", str(garbage), str(tmp_path / "out")]) == 2
    assert "garbage.ckpt' can't be read as a checkpoint" in capsys.readouterr().err
    torch.save([1], garbage)
    assert main(["export", str(garbage), str(tmp_path / "out")]) == 2
    assert "is not a checkpoint of a Trainer" in capsys.readouterr().err


def test_a_checkpoint_does_not_say_what_is_run_when_it_is_exported(tmp_path):
    saved = {
        "model": "shipped:quickstart",
        "loss": {"class_path": "pathlib.Path.touch", "init_args": {"self": str(tmp_path / "ran")}},
        "lora": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}},
    }
    state = {"pytorch-lightning_version": "2.6.6", "hyper_parameters": saved, "state_dict": {}}
    with pytest.raises(CheckpointError, match=r"`subprocess\.Popen` .* so it is not run"):
        build_module(state, tmp_path, trust_remote_code=False)
    saved |= {"lora": None, "model": "a/b", "model_kwargs": {"trust_remote_code": True}}
    with pytest.raises(ConfigError, match=r"'a/b' comes with code .* add --trust-remote-code"):
        build_module(state, tmp_path, trust_remote_code=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_shards_are_joined_with_what_lies_beside_them(tmp_path):
    folder = tmp_path / "step=4.ckpt"
    weights = {"policy.weight": torch.arange(4.0)}
    save({"state_dict": weights}, storage_writer=FileSystemWriter(folder))
    beside = {"hyper_parameters": {"model": "tiny"}, "pytorch-lightning_version": "2.6.6"}
    torch.save(beside, folder / "meta.pt")
    state = read_checkpoint(folder)
    assert state["hyper_parameters"] == {"model": "tiny"}
    assert torch.equal(state["state_dict"]["policy.weight"], torch.arange(4.0))
    assert [path.name for path in Path(tmp_path).iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "nowhere/model", "a/b/c", "a b", ""])
def test_what_is_no_folder_is_told_before_anything_is_loaded(name, monkeypatch, capsys):
    """The hub's own client would ask for each file five times."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # where nobody listens
    assert main(["serve", name]) == 2
    assert "there is no folder of that name, and" in capsys.readouterr().err


def test_a_dataset_s_missing_folder_is_not_looked_for_under_another_name(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match="it can't be a hub id"):
        open_rows("./openai/gsm8k")


# ---- install server -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PYTHONPATH", "")


def test_an_environment_that_is_there_is_remembered(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.5.19\n")
    python.chmod(0o755)
    assert main(["install-server", "--cpu", "--use", str(python)]) == 0
    assert capsys.readouterr().out.startswith(f"SGLang 0.5.19 for the cpu: {python}\n")
    assert resolve_python("auto") == ServerPython(str(python), "0.5.19", "cpu")


def test_one_without_sglang_is_refused(capsys):
    assert main(["install-server", "--use", sys.executable]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {sys.executable} has no SGLang. Name an interpreter that has it"
    )
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\necho 'broken: no module' >&2; exit 1\n", "broken: no module"),
        ("no program", "can't be run as a Python"),
    ],
)
def test_what_is_no_python_is_refused_in_a_line(tmp_path, capsys, text, said):
    program = tmp_path / "python"
    program.write_text(text)
    program.chmod(0o755)
    assert main(["install-server", "--use", str(program)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_a_dry_run_says_where_what_and_how_large_and_makes_nothing(tmp_path, capsys):
    folder = tmp_path / "servers" / "sglang"
    options = ["--dry-run", "--folder", str(folder), "--", "--index-url", "URL"]
    assert main(["install-server", *options]) == 0
    said = capsys.readouterr().out
    assert f"allow 15 GB in {folder}, where" in said
    assert "pip install --index-url URL sglang==" in said
    assert not folder.parent.exists()


def test_one_that_is_not_there_is_refused(capsys):
    assert main(["install-server", "--use", "/nowhere/python"]) == 2
    assert "/nowhere/python" in capsys.readouterr().err


def test_a_failed_installation_shows_the_end_of_pips_output_and_is_not_remembered(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path / "new"), "--version", "0.0.0", "--", "--no-index"]
    assert main(["install-server", *arguments]) == 1
    assert "sglang==0.0.0" in capsys.readouterr().err
