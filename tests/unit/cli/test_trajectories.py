from __future__ import annotations

import io
import json
import os
import sys
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


def test_a_headline_has_the_advantage_where_one_was_computed(folder):
    row = dict(read_rows(folder)[0], advantage=-0.70711)
    assert "reward 0 (right 0, format 1) | advantage -0.707 | 2 tokens" in headline(row)


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


def test_held_out_answers_of_a_run_that_trained_are_shown_when_asked_for(folder, capsys):
    file = folder / "trajectories" / "held_out" / "step_000002.parquet"
    write_groups(file, [make_group(7)], step=2, version=2, outcome="held out")
    assert main(["show", str(folder), "--held-out"]) == 0
    said = capsys.readouterr().out
    assert "What is 7 + 7?" in said
    assert "What is 0 + 0?" not in said
    assert main(["show", str(file.parents[1] / "step_000001.parquet"), "--held-out"]) == 2
    assert "holds no answers to held-out prompts" in capsys.readouterr().err


def test_the_other_columns_of_a_row_are_printed_which_say_why_an_answer_is_wrong(folder):
    row = dict(read_rows(folder)[0], columns='{"target": "4", "notes": "' + "x" * 300 + '"}')
    text = shown([row])
    assert "target: 4" in text
    assert "x" * 300 not in text


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


# ---- `lightning-grpo score`: a reward on recorded completions -----------------------------------

REWARDS = """
import time

def right(completion, answer):
    return float(completion == answer)

def picky(completion):
    if completion == "7":
        raise ValueError("no sevens")
    return {"short": 1.0, "odd": len(completion) % 2}

def slow(completion):
    time.sleep(30)

async def later(prompt, completion):
    return float(len(prompt))
"""


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A file of rows beside a module of rewards, in the current folder."""
    (tmp_path / "my_score_rewards.py").write_text(REWARDS)
    rows = [{"prompt": "2+2", "completion": c, "answer": "4"} for c in ("4", "5", "7")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("my_score_rewards", None)


def score(*arguments):
    return main(["score", *map(str, arguments)])


def test_every_row_is_scored_and_summed_up(rows, capsys):
    assert score("--reward", "my_score_rewards.right", "--data", rows) == 0
    out = capsys.readouterr().out
    assert "    0  1  4\n    1  0  5\n" in out
    assert "3 scored" in out
    assert "right: mean 0.3333, from 0 to 1" in out


def test_failures_are_told_and_named_values_stay_apart(rows, capsys):
    assert score("--reward", "my_score_rewards.picky", "--data", rows) == 1
    out = capsys.readouterr().out
    assert "short 1, odd 1" in out
    assert "2  failed  7" in out
    assert "2 scored" in out
    assert "1 failed" in out
    assert "no sevens" in out


def test_a_stuck_reward_is_ended(rows, capsys):
    arguments = ("--reward", "my_score_rewards.slow", "--data", rows)
    assert score(*arguments, "--timeout-s", 0.5, "--limit", 1) == 1
    assert "took longer than `reward_timeout_s` (0.5 s)" in capsys.readouterr().out


def test_coroutines_and_in_line_calls_work(rows, capsys):
    assert score("--reward", "my_score_rewards.later", "--data", rows, "--processes", 0) == 0
    assert "later: mean 3" in capsys.readouterr().out


def test_trajectories_of_a_run_are_compared_with_what_was_recorded(tmp_path, rows, capsys):
    write_groups(tmp_path / "run" / "trajectories" / "a.parquet", [make_group()], step=1, version=1)
    assert score("--reward", "my_score_rewards.right", "--data", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "(recorded 1)" in out
    assert "1 of 2 differ from the recorded reward" in out


def test_mistakes_are_told_in_a_line(rows, tmp_path, capsys):
    assert score("--reward", "my_score_rewards.rigt", "--data", rows) == 2
    assert "did you mean `my_score_rewards.right`?" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x"}\n')
    assert score("--reward", "my_score_rewards.right", "--data", other) == 2
    assert "every row must have a text `completion`" in capsys.readouterr().err
    other.write_text('{"completion": "x"}\n')
    assert score("--reward", "my_score_rewards.right", "--data", other) == 2
    assert "asks for 'answer', which is no column" in capsys.readouterr().err
