from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from lightning_grpo.cli.main import main
from lightning_grpo.cli.trajectories import headline, select, show_rows
from lightning_grpo.rollout.records import read_rows, write_groups
from tests.fakes.tiny_run import make_group


@pytest.fixture
def folder(tmp_path):
    """A run's folder with two rollout batches."""
    for step in (1, 2):
        path = tmp_path / "run" / "trajectories" / f"step_{step:06d}.parquet"
        write_groups(path, [make_group(0), make_group(step, (0.5,))], step=step, version=step)
    return tmp_path / "run"


def shown(rows) -> str:
    console = Console(file=io.StringIO(), width=120)
    show_rows(rows, console)
    return console.file.getvalue()


def test_a_headline_says_what_there_is_to_know(folder):
    assert headline(read_rows(folder)[1]) == (
        "step 1 | pass 0 row 0 | reward 1 (right 1, format 1) | 2 tokens | "
        "weights 0, staleness 1 | trained"
    )


def test_trajectories_are_ordered_and_limited(folder):
    rows = select(read_rows(folder), sort="reward", reverse=True, limit=3)
    assert [(row["reward"], row["step"]) for row in rows] == [(1.0, 1), (1.0, 2), (0.5, 1)]


def test_one_prompt_can_be_followed(folder):
    rows = select(read_rows(folder), row=2, limit=10)
    assert [(row["step"], row["row"]) for row in rows] == [(2, 2)]


def test_prompt_and_completion_are_printed(folder):
    text = shown(select(read_rows(folder), limit=1))
    assert "What is 0 + 0?" in text
    assert "answer 0" in text
    assert "reward 0" in text


def test_markup_in_a_completion_is_printed_as_it_is(folder):
    row = dict(read_rows(folder)[0], completion="[bold]so[/bold] [1, 2]")
    assert "[bold]so[/bold] [1, 2]" in shown([row])


def test_every_turn_of_a_conversation_is_printed(folder):
    row = dict(read_rows(folder)[0], transcript="5<|im_end|> user: Too small. assistant: 7")
    assert "Too small. assistant: 7" in shown([row])
    assert "turns" in shown([row])


def test_of_a_run_s_folder_the_version_written_last_is_shown(tmp_path):
    for version, step in (("version_1", 7), ("version_0", 3)):
        path = tmp_path / "quickstart" / version / "trajectories" / f"step_{step:06d}.parquet"
        write_groups(path, [make_group(0)], step=step, version=step)
        os.utime(path.parent, (step, step))
    (tmp_path / "quickstart/version_2/trajectories/held_out").mkdir(parents=True)  # validated only
    assert {row["step"] for row in read_rows(tmp_path / "quickstart")} == {7}


def test_nothing_to_show_is_said():
    assert shown([]) == "no trajectories\n"


def test_the_command_reads_a_runs_folder(folder, capsys):
    assert main(["show", str(folder), "--limit", "2", "--sort", "length"]) == 0
    assert capsys.readouterr().out.count("completion") == 2


@pytest.mark.parametrize("path", ["nowhere", "nowhere/step_000001.parquet"])
def test_a_path_that_is_not_there_is_a_mistake_of_the_command(path, capsys):
    assert main(["show", path]) == 2
    assert f"there is no '{path}'" in capsys.readouterr().err


def test_a_number_out_of_range_is_a_mistake_of_the_command(folder, capsys):
    assert main(["show", str(folder), "--limit", "-1"]) == 2
    assert "argument --limit: must be >= 0, got -1" in capsys.readouterr().err


def test_of_a_run_that_only_answered_the_held_out_answers_are_shown(tmp_path, capsys):
    file = tmp_path / "version_0/trajectories/held_out/step_000002.parquet"
    write_groups(file, [make_group(5)], step=2, version=1, outcome="held out")
    assert main(["show", str(tmp_path)]) == 0
    assert "What is 5 + 5?" in capsys.readouterr().out


def test_a_folder_without_trajectories_is_refused(tmp_path, capsys):
    Path("empty").mkdir()
    assert main(["show", "empty"]) == 2
    assert "No trajectories at 'empty'" in capsys.readouterr().err


def test_a_completion_does_not_command_the_terminal(folder):
    row = dict(
        read_rows(folder)[0], completion="a\x1b]52;c;eA==\x07 \x9b2J \u202ez", prompt="\x1bc"
    )
    text = shown([row])
    assert r"a\x1b]52;c;eA==\x07 \x9b2J \u202ez" in text
    assert "\x1b" not in text
