from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
import yaml

from lightning_grpo.cli.folders import write_task
from lightning_grpo.cli.main import main
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
