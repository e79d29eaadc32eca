from __future__ import annotations

import base64
import gzip
import http.client
import json
import re
import threading

import pytest

from lightning_grpo.report.answers import choose_answers
from lightning_grpo.report.page import PageServer, packed, page_data, render_page
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
