"""`lightning-grpo certify`: lines, exit statuses, and what is a mistake."""

from __future__ import annotations

import json

import pytest

from lightning_grpo.certify.checks import CheckLine
from lightning_grpo.cli.certify import page, say_json, status_of
from lightning_grpo.cli.main import main
from tests.unit.certify.test_run import GOOD, REFUSED, WRONG


def test_a_model_is_certified_line_by_line(capsys):
    assert main(["certify", "shipped:quickstart"]) == 0
    said = capsys.readouterr().out.splitlines()
    found = [line.split()[:2] for line in said[:-2]]
    assert [name for _, name in found] == [
        *("architecture", "packed", "apart", "prefixes", "passes", "gradient", "cuts"),
        *("ranks", "checkpoint", "flops", "names", "engine", "adapter", "export", "template"),
    ]
    assert {verdict for verdict, _ in found} <= {"ok", "skipped"}
    assert ", at most 0.0001" in said[1]
    assert said[-1] == "shipped:quickstart: certified"


@pytest.mark.parametrize("model", ["mamba", "MambaConfig"])
def test_a_refusal_is_one_line_and_an_exit_status_of_its_own(model, capsys):
    assert main(["certify", model, "--json"]) == 3
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["check"], line["verdict"]) == ("architecture", "refused")
    assert "must have recurrent layers that can begin anew" in line["found"]


def test_a_folder_of_a_config_alone_is_enough(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "doge"}')
    assert main(["certify", str(tmp_path)]) == 3
    assert "gives it a mask of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "must be a folder that exists"),
        (["--json"], "MODEL"),
        (["qwen3", "--all"], "MODEL"),
        (["qwen3", "--out", "x.md"], "--out"),
        (["--most"], "unrecognized"),
    ],
)
def test_a_mistake_is_said_in_one_sentence(words, said, capsys):
    assert main(["certify", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_config_that_can_t_be_read_is_a_mistake(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    assert main(["certify", str(tmp_path)]) == 2
    assert "an architecture of transformers" in capsys.readouterr().err


def test_help_says_what_each_line_and_each_status_means(capsys):
    assert main(["certify", "--help"]) == 0
    said = capsys.readouterr().out
    assert "Exit status: 0 certified; 1" in said


def test_the_worst_of_several_is_the_exit_status():
    assert status_of([GOOD]) == 0
    assert status_of([GOOD, REFUSED]) == 3
    assert status_of([GOOD, REFUSED, WRONG]) == 1


def test_a_figure_that_is_no_number_is_null_for_a_program(capsys):
    say_json(CheckLine("packed", "WRONG", "", float("nan"), 1e-4))
    assert json.loads(capsys.readouterr().out)["figure"] is None


def test_the_page_has_versions_counts_and_a_row_for_each():
    said = page([GOOD, REFUSED, WRONG])
    assert "1 certified, 1 refused, 1 WRONG, 0 untried, of 3 (transformers " in said
    assert "| `qwen3` | certified |" in said
