""""""

from __future__ import annotations

import base64
import gzip
import http.client
import importlib.util
import json
import re
import subprocess
import sys
import threading
from xml.etree import ElementTree

import pytest

from lightning_grpo.report.answers import choose_answers
from lightning_grpo.report.page import (
    CHARTS,
    PageServer,
    drawn,
    escaped,
    explained,
    markdown,
    packed,
    page_data,
    render_page,
    write_pictures,
)
from lightning_grpo.report.run import read_runs
from tests.fakes.report_runs import answer, group, step_row, write_batch, write_metrics, write_run

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \u202e abc \U0001f600 \ud800 & \0"


def data_of(*folders):
    runs = read_runs(folders)
    return page_data(runs, choose_answers(runs))


def embedded(page: str) -> dict:
    (block,) = re.findall(r'<script type="text/plain" id="data">([A-Za-z0-9+/=]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(block)))


def test_the_page_holds_the_data_that_it_was_given(tmp_path):
    data = data_of(write_run(tmp_path / "mine/version_0"))
    page = render_page(data)
    assert embedded(page) == json.loads(json.dumps(data))
    assert "<title>mine - lightning-grpo report</title>" in page


def test_nothing_that_a_model_wrote_is_markup_in_the_page(tmp_path):
    run = tmp_path / "<b>run"
    text = HOSTILE.replace("\ud800", "").replace("\0", "")
    write_batch(run, 1, [group(0, [answer(text)], asked=text, note=text)])
    page = render_page(data_of(run))
    assert "alert(1)" not in page
    assert "<b>run" not in page
    assert "&lt;b&gt;run" in page
    shown = embedded(page)["groups"][0]
    assert shown["answers"][0]["text"] == text
    assert shown["prompt"][0]["text"] == text


def test_text_that_has_no_utf_8_does_not_stop_the_page():
    assert b"?" in gzip.decompress(packed({"text": "\ud800"}))


def test_a_page_asks_the_network_for_nothing(tmp_path):
    page = render_page(data_of(write_run(tmp_path)))
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', page)
    assert "default-src &#39;none&#39;" in page
    assert "unsafe" not in re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]


def test_only_programs_of_the_page_itself_may_run(tmp_path):
    page = render_page(data_of(write_run(tmp_path)))
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    (allowed,) = re.findall(r"script-src ([^;]*)", policy.replace("&#39;", "'"))
    assert re.fullmatch(r"('sha256-[A-Za-z0-9+/=]{44}' ?){2}", allowed)


def test_the_same_run_gives_the_same_page(tmp_path):
    write_run(tmp_path)
    assert render_page(data_of(tmp_path)) == render_page(data_of(tmp_path))


def test_numbers_that_json_lacks_are_not_in_the_data(tmp_path):
    write_metrics(tmp_path, [step_row(1, policy__grad_norm=float("nan"))])
    write_batch(tmp_path, 1, [group(0, [answer(reward=float("-inf"))])])
    data = data_of(tmp_path)
    packed(data)
    (run,) = data["runs"]
    assert run["marks"] == [
        {"step": 1, "level": "WARNING", "text": "policy/grad_norm was nan", "at": None}
    ]
    assert data["groups"][0]["answers"][0]["reward"] == "-inf"


def test_a_run_of_which_only_the_folder_is_there_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {batch_size: 4}\n")
    data = data_of(tmp_path)
    (run,) = data["runs"]
    assert run["setup"] == {"data.batch_size": "4"}
    assert (run["steps"], run["trained"], data["groups"], data["charts"]) == ([], [], [], [])
    assert render_page(data).startswith("<!doctype html>")


def test_a_chart_names_the_metrics_that_are_there_and_what_they_mean(tmp_path):
    data = data_of(write_run(tmp_path))
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:2] == ["Reward", "Held-out score"]
    assert "Staleness" not in titles, "it was not logged"
    assert data["explained"]["reward/mean"]["healthy"].startswith("rises over tens of batches")
    assert data["explained"]["eval/avg_at_1"]["meaning"].startswith("mean reward of k sampled")


def test_an_answer_of_a_megabyte_is_there_in_full(tmp_path):
    text = "word \u05e9\u05dc\u05d5\u05dd " * 100_000
    write_batch(tmp_path, 1, [group(0, [answer(text)])])
    page = render_page(data_of(tmp_path))
    assert embedded(page)["groups"][0]["answers"][0]["text"] == text
    assert len(page) < 1_000_000, "it is compressed"


# -- serving --------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A server of a run whose reading is counted: (port, folder, readings)."""
    folder, readings = write_run(tmp_path), []

    def read():
        readings.append(1)
        return data_of(folder)

    served = PageServer(read, lambda: len(list(folder.glob("trajectories/*"))), refresh_s=0.5)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served.server_port, folder, readings
    served.shutdown()
    thread.join()
    served.server_close()


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply, body


def test_a_served_page_asks_for_newer_data_and_gets_them_when_there_are_any(server):
    port, folder, readings = server
    reply, body = get(port, "/")
    page = body.decode()
    assert reply.status == 200
    assert 'data-refresh="0.5"' in page
    tag = re.findall(r'data-tag="([^"]*)"', page)[0].replace("&#34;", '"')
    reply, body = get(port, "/data", **{"If-None-Match": tag})
    assert (reply.status, body) == (304, b"")
    assert len(readings) == 1, "nothing changed, so nothing was read"
    write_batch(folder, 7, [group(0, [answer("new")])])
    reply, body = get(port, "/data", **{"If-None-Match": tag})
    assert reply.status == 200
    assert json.loads(gzip.decompress(body))["groups"][-1]["answers"][0]["text"] != ""
    assert len(readings) == 2


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", ""])
def test_a_page_of_the_web_can_t_read_it_through_a_name_of_its_own(server, host):
    reply, body = get(server[0], "/data", Host=host)
    assert (reply.status, body) == (403, b"")


def test_nothing_else_is_served(server):
    assert get(server[0], "/../../etc/passwd")[0].status == 404


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
