from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from lightning_grpo.report.charts import CHARTS, drawn, explained, write_pictures
from lightning_grpo.report.run import read_runs
from lightning_grpo.report.text import escaped, markdown
from tests.fakes.report_runs import step_row, write_metrics, write_run


def test_the_text_answers_each_question_and_shows_the_curve(tmp_path):
    text = markdown(read_runs([write_run(tmp_path / "mine/version_0")]))
    assert text.startswith("# mine\n\n**How did it end?** It ran to its end at step 6.")
    assert "**Which step was best?** Step 6: eval/avg_at_1 0.750" in text
    assert "| 3 |  | 0.3 | 23 |" in text
    assert "- step 3: server 1 is out" in text
    assert "torch 2.13.0" in text


def test_several_runs_are_compared_first(tmp_path):
    write_run(tmp_path / "a/version_0")
    write_metrics(tmp_path / "b/version_0", [step_row(1)])
    text = markdown(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert "| a | 6 | 0.75 | 0.75 | 0.4 | 2 |" in text
    assert "| b | 1 |  |  | 0.1 | 2 |" in text
    assert re.findall("^# .*", text, re.M) == ["# Runs", "# a", "# b"]


def test_a_table_has_as_many_cells_in_each_row_as_in_its_head(tmp_path):
    text = markdown(read_runs([write_run(tmp_path)]))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert len({row.count("|") for row in rows}) == 1


def test_a_stranger_s_words_are_no_markdown():
    assert escaped("<b>[x](y)</b>\n# `h` | *e*") == (
        "\\<b>\\[x\\](y)\\</b> \\# \\`h\\` \\| \\*e\\*"
    )


def test_names_are_read_in_a_terminal_as_they_are_written():
    assert escaped("eval/avg_at_1: 0.2 -> 0.8") == "eval/avg_at_1: 0.2 -> 0.8"
    assert escaped("> __a__") == "\\> \\_\\_a\\_\\_"


def test_an_empty_run_has_a_text(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    assert "No step was trained." in markdown(read_runs([tmp_path]))


def test_one_named_reward_alone_is_not_drawn_twice(tmp_path):
    reward = CHARTS[0]
    write_metrics(tmp_path / "one", [step_row(1, reward__right__mean=0.1)])
    write_metrics(tmp_path / "two", [step_row(1, reward__right__mean=0.1, reward__form__mean=1)])
    one, two = read_runs([tmp_path / "one", tmp_path / "two"])
    assert drawn(reward, [one]) == ["reward/mean"]
    assert drawn(reward, [two]) == ["reward/mean", "reward/form/mean", "reward/right/mean"]
    assert drawn(reward, [one, two]) == ["reward/mean"]


@pytest.mark.parametrize(
    ("metric", "meaning"),
    [
        ("reward/std", "spread over all trajectories"),
        ("reward/gsm8k/mean", "each reward by its name"),
        ("eval/pass_at_4", "chance that one of k samples"),
        ("eval/math/avg_at_4", "mean reward of k sampled answers"),
        ("time/step_s", "the whole period"),
    ],
)
def test_a_metric_is_explained_as_in_its_page(metric, meaning):
    assert explained(metric).meaning.startswith(meaning)


def test_a_metric_of_the_user_s_own_is_not_explained():
    assert explained("mine/value") is None


def test_every_metric_of_a_chart_is_in_the_page_of_metrics():
    names = [name for chart in CHARTS for name in chart.metrics if name != "eval/*"]
    assert [name for name in names if explained(name) is None] == []


def test_pictures_are_svg_and_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    runs = read_runs([write_run(tmp_path / "run")])
    files = write_pictures(runs, tmp_path / "first")
    assert {"reward.svg", "held_out_score.svg", "time.svg"} <= {file.name for file in files}
    for file in files:
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_without_matplotlib_pictures_are_refused_with_the_way_out(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from lightning_grpo.cli.main import main\n"
        f"sys.exit(main(['report', {str(write_run(tmp_path))!r}, '--pictures', 'out']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "`--pictures` needs matplotlib. Install it with `pip install matplotlib`" in done.stderr


def test_a_report_is_made_without_torch(tmp_path):
    code = (
        "import sys; from lightning_grpo.cli.main import main\n"
        f"main(['report', {str(write_run(tmp_path))!r}, '--out', 'r.html'])\n"
        "print({'torch', 'lightning', 'transformers', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert importlib.util.find_spec("torch") is not None, "else this shows nothing"
