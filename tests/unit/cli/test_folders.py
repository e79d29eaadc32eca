""""""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemWriter, save

from lightning_grpo.cli.folders import build_module, check_paths, read_checkpoint, write_task
from lightning_grpo.cli.main import main
from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.rewards import gsm8k
from tests.fakes.report_runs import write_run


@pytest.fixture
def task(tmp_path):
    write_task(tmp_path / "sums")
    return tmp_path / "sums"


def test_a_disk_that_takes_no_file_is_told_with_a_way_out(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert main(["init", str(tmp_path / "task")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "`name` must be a folder that can be written to (File too large)" in said
    assert "Name another, or free some of its disk." in said


def test_a_new_folder_has_all_that_a_run_needs_and_says_how_to_run_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "sums"]) == 0
    assert sorted(file.name for file in (tmp_path / "sums").iterdir()) == [
        "README.md",
        "config.yaml",
        "gpu.yaml",
        "reward.py",
        "test.jsonl",
        "test_reward.py",
        "train.jsonl",
    ]
    printed = capsys.readouterr().out
    assert "cd sums" in printed
    assert "lightning-grpo fit --config config.yaml" in printed
    assert (tmp_path / "sums/README.md").read_text().startswith("# sums\n")


def test_its_reward_passes_its_own_test(task):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_reward.py"],
        cwd=task, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


def test_its_reward_agrees_with_the_ready_one_on_its_prompts(task):
    scope: dict = {}
    exec((task / "reward.py").read_text(), scope)
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    for row, other in pairwise(rows):
        for said in (row["answer"], other["answer"]):
            assert scope["reward"](said, row["answer"]) == gsm8k(said, row["answer"])


def test_what_its_readme_says_of_a_run_can_be_typed(task, monkeypatch, capsys):
    monkeypatch.chdir(task)
    monkeypatch.delitem(sys.modules, "reward", raising=False)
    write_run(task / "runs/config/version_0")
    lines = (task / "README.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if " runs/config" in line]
    assert [words[0] for words in commands] == ["report", "show", "score"]
    for words in commands:
        assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["gpu.yaml"]])
def test_its_configs_are_understood_by_fit(task, monkeypatch, capsys, extra):
    monkeypatch.chdir(task)
    configs = [word for name in ["config.yaml", *extra] for word in ("--config", name)]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *configs, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["data"]["workflow"]["init_args"]["reward"] == "reward.reward"
    assert shown["trainer"]["accelerator"] == ("gpu" if extra else "cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [("full", "`name` must be a new or empty folder"), ("file", "must be a new or empty folder")],
)
def test_nothing_is_written_over(tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.yaml").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert main(["init", name]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "full" / "config.yaml").read_text() == (tmp_path / "file").read_text()


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
