from __future__ import annotations

import sys

import pytest
from huggingface_hub import constants

from lightning_grpo.cli.launch import engine_command
from lightning_grpo.cli.main import main
from lightning_grpo.errors import ConfigError
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "tests.fakes.loops.Recorder"], "must be a RolloutDataModule, and"),
        (["--data", "tests.fakes.loops.Nobody"], "`tests.fakes.loops` has no `Nobody`"),
        (["--model", "tests.fakes.loops.Recorder"], "must be a GRPOModule, and"),
    ],
)
def test_a_job_of_a_class_that_fit_refuses_is_refused_before_it_is_sent(options, said, capsys):
    assert main(["launch", "slurm", "--config", "quickstart.yaml", *options]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""
