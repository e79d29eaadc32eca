"""`lightning-grpo replay` before anything heavy is imported."""

from __future__ import annotations

import pytest

from lightning_grpo.cli.fit import find_config, split_recording
from lightning_grpo.cli.main import main
from lightning_grpo.cli.sources import ConfigProblem


@pytest.mark.parametrize("words", [["--from", "{}"], ["--from={}"]])
def test_the_recording_is_taken_out_of_the_options(tmp_path, words):
    options = ["--trainer.max_steps", "3", *(word.format(tmp_path) for word in words)]
    assert split_recording(options) == (tmp_path, ["--trainer.max_steps", "3"])


@pytest.mark.parametrize("options", [["--trainer.max_steps", "3"], ["--from"]])
def test_a_missing_recording_is_asked_for(options):
    with pytest.raises(ConfigProblem, match="needs the folder of a run"):
        split_recording(options)


def test_a_recording_that_does_not_exist_is_named(capsys, tmp_path):
    assert main(["replay", "--from", str(tmp_path / "none")]) == 2
    assert "must exist, got" in capsys.readouterr().err


def test_the_config_of_the_run_is_found_from_its_folder_its_trajectories_and_a_file(tmp_path):
    folder = tmp_path / "trajectories"
    folder.mkdir()
    (folder / "step_1.parquet").touch()
    with pytest.raises(ConfigProblem, match=r"no config\.yaml"):
        find_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    for recording in (tmp_path, folder, folder / "step_1.parquet"):
        assert find_config(recording) == tmp_path / "config.yaml"


def test_of_a_run_of_several_versions_the_config_of_the_last_is_taken(tmp_path):
    folder = tmp_path / "version_3/trajectories"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigProblem, match="No trajectories at"):
        find_config(tmp_path)
    (folder / "step_1.parquet").touch()
    (tmp_path / "version_3/config.yaml").touch()
    assert find_config(tmp_path) == tmp_path / "version_3/config.yaml"


def test_help_needs_no_recording(capsys):
    assert main(["replay", "--help"]) == 0
    assert "lightning-grpo replay --from RUN" in capsys.readouterr().out
