import sys

import pytest

from lightning_grpo.cli.main import main
from lightning_grpo.servers.installed import ServerPython, resolve_python


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
    assert main(["install-server", "--use", sys.executable]) == 1
    assert "sglang" in capsys.readouterr().err


def test_one_that_is_not_there_is_refused(capsys):
    assert main(["install-server", "--use", "/nowhere/python"]) == 2
    assert "/nowhere/python" in capsys.readouterr().err


def test_a_failed_installation_shows_the_end_of_pips_output_and_is_not_remembered(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path / "new"), "--version", "0.0.0", "--", "--no-index"]
    assert main(["install-server", *arguments]) == 1
    assert "sglang==0.0.0" in capsys.readouterr().err
