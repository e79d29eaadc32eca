"""`lightning-grpo score`: a reward on recorded completions."""

from __future__ import annotations

import json
import sys

import pytest

from lightning_grpo.cli.main import main
from lightning_grpo.rollout.records import write_groups
from tests.fakes.tiny_run import make_group

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
