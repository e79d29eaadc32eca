from __future__ import annotations

import json

import pytest

from lightning_grpo.cli.main import main
from tests.fakes.report_runs import write_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/mine/version_0")
    return "runs/mine"


def test_a_page_is_written_where_it_is_asked_for(run, tmp_path, capsys):
    assert main(["report", run]) == 0
    assert capsys.readouterr().out.startswith("wrote report.html (")
    assert main(["report", run, "--out", "new/page.html", "--limit", "4"]) == 0
    first, second = (tmp_path / name for name in ("report.html", "new/page.html"))
    assert first.read_text().startswith("<!doctype html>")
    assert len(second.read_text()) < len(first.read_text())
    assert list(tmp_path.glob("**/*.tmp")) == []


def test_text_is_written_to_the_screen_or_to_a_file(run, tmp_path, capsys):
    assert main(["report", run, "--format", "md"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# mine")
    assert main(["report", run, "--format", "md", "--out", "run.md"]) == 0
    assert (tmp_path / "run.md").read_text() == printed


def test_a_trace_alone_writes_no_page(run, tmp_path):
    assert main(["report", run, "--trace", "trace.json"]) == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "error: 'nowhere' does not exist: expected a run's folder"),
        ([], "the following arguments are required: RUN"),
        (["runs/mine", "--steps", "last"], "`--steps` must be steps such as 12, 10-14 or 0,20,40"),
        (["runs/mine", "--limit", "0"], "must be >= 1, got 0"),
        (["runs/mine", "--serve", "70000"], "--serve: must be a port from 0 to 65535, got 70000"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(run, capsys, arguments, said):
    assert main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err
