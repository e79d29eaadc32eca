from __future__ import annotations

import json
import os

import pytest

from lightning_grpo.errors import UnreadableError
from lightning_grpo.report.run import (
    chrome_trace,
    find_folder,
    lanes_of,
    names_of,
    read_run,
    read_runs,
    reconstructed,
    stamp,
    step_times,
    uptime,
)
from tests.fakes.report_runs import (
    BEGAN,
    answer,
    group,
    span_line,
    start_line,
    step_row,
    write_batch,
    write_metrics,
    write_run,
    write_timeline,
)


def read(folder):
    return read_run(folder, "run")


def test_a_step_and_its_validation_are_one_row(tmp_path):
    write_metrics(
        tmp_path,
        [{"step": 0, "eval/avg_at_1": 0.5}, step_row(1), {"step": 1, "eval/avg_at_1": 0.6}],
    )
    run = read(tmp_path)
    assert run.steps == [0, 1]
    assert run.table["eval/avg_at_1"] == [0.5, 0.6]
    assert run.table["reward/mean"] == [None, 0.1]
    assert run.trained == [1]


def test_of_a_step_that_was_taken_twice_the_later_values_count(tmp_path):
    write_metrics(tmp_path, [step_row(1), step_row(2), step_row(2, reward__mean=0.9)])
    assert read(tmp_path).series("reward/mean") == [(1, 0.1), (2, 0.9)]


def test_a_torn_last_row_is_passed_over(tmp_path):
    write_metrics(tmp_path, [step_row(1), step_row(2)])
    file = tmp_path / "metrics.csv"
    file.write_text(file.read_text().rstrip()[:-9])
    assert read(tmp_path).steps == [1]


def test_what_is_not_finite_is_left_out_and_told(tmp_path):
    rows = [step_row(1, policy__grad_norm=float("nan")), step_row(2, ratio__max=float("inf"))]
    write_metrics(
        tmp_path, [*rows, {"step": 2, "eval/greedy": 1.0, "eval/greedy_ci95_low": float("nan")}]
    )
    run = read(tmp_path)
    assert run.series("policy/grad_norm") == [(2, 0.5)]
    assert run.not_finite == [(1, "policy/grad_norm", "nan"), (2, "ratio/max", "inf")]


def test_a_run_without_any_number_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 3}\n")
    run = read(tmp_path)
    assert (run.steps, run.table, run.trained, run.score) == ([], {}, [], None)
    assert run.setting("trainer.max_steps") == 3


def test_a_broken_config_is_none(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: [\n")
    assert read(tmp_path).setting("trainer.max_steps", "unknown") == "unknown"


def test_a_setting_is_found_within_its_class(tmp_path):
    assert read(write_run(tmp_path)).setting("model.model") == "shipped:quickstart"


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        (("eval/pass_at_4", "eval/avg_at_4", "eval/greedy"), "eval/avg_at_4"),
        (("eval/math/avg_at_1", "eval/code/avg_at_1"), "eval/code/avg_at_1"),
        (("eval/greedy", "eval/greedy_ci95_low"), "eval/greedy"),
        (("reward/mean",), None),
    ],
)
def test_a_run_is_judged_by_the_mean_of_sampled_held_out_answers_where_there_is_one(
    tmp_path, metrics, score
):
    write_metrics(tmp_path, [{"step": 0} | dict.fromkeys(metrics, 0.5)])
    assert read(tmp_path).score == score


# -- folders --------------------------------------------------------------------------------------


def test_of_a_name_the_version_that_trained_last_is_read(tmp_path):
    for version, when in (("version_1", 7), ("version_0", 3)):
        write_batch(tmp_path / version, 1, [group(0, [answer()])])
        file = tmp_path / version / "trajectories" / "step_000001.parquet"
        os.utime(file, (when, when))
    (tmp_path / "version_2").mkdir()
    (tmp_path / "version_2" / "config.yaml").write_text("{}")  # failed before its first step
    assert find_folder(tmp_path) == tmp_path / "version_1"


def test_a_run_that_never_trained_is_found_where_there_is_no_other(tmp_path):
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "config.yaml").write_text("{}")
    assert find_folder(tmp_path) == tmp_path / "version_0"


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_a_run_is_refused_by_name(tmp_path, made):
    folder = tmp_path / "nothing"
    if made:
        folder.mkdir()
    with pytest.raises(UnreadableError, match=r"nothing' (holds no run|does not exist): expected"):
        find_folder(folder)


def test_runs_are_named_as_shortly_as_tells_them_apart(tmp_path):
    def named(*parts):
        return names_of([tmp_path / part for part in parts])

    assert named("a/version_0", "b/version_3") == ["a", "b"]
    assert named("a/version_0", "a/version_1") == ["a/version_0", "a/version_1"]
    assert len(set(named("a/version_0", "a/version_0"))) == 2


# -- time -----------------------------------------------------------------------------------------


def test_a_step_holds_the_weight_sync_of_the_step_before(tmp_path):
    write_metrics(tmp_path, [step_row(1, time__weight_sync_s=0.25), step_row(2)])
    times = step_times(read(tmp_path))
    assert times[1] == pytest.approx(
        {
            "waiting": 0.5,
            "forward and backward": 1.0,
            "optimizer": 0.1,
            "weight sync": 0.0,
            "other": 0.4,
        }
    )
    assert times[2]["weight sync"] == 0.25
    assert sum(times[2].values()) == pytest.approx(2.0)


def test_without_a_timeline_the_trainer_s_steps_are_laid_end_to_end(tmp_path):
    write_metrics(tmp_path, [step_row(1), step_row(2)])
    spans = reconstructed(read(tmp_path))
    assert {span.lane for span in spans} == {"trainer"}
    assert spans[0].at == 0.0
    assert spans[-1].at + spans[-1].seconds == pytest.approx(4.0)
    assert [span.what for span in spans if span.step == 2][:2] == ["weight sync", "waiting"]


# -- timeline -------------------------------------------------------------------------------------


def test_the_timeline_tells_how_a_run_began_and_ended(tmp_path):
    timeline = read(write_run(tmp_path)).timeline
    assert timeline.starts[0].described == {"model": "shipped:quickstart (0.46M parameters)"}
    assert timeline.starts[0].versions["torch"] == "2.13.0"
    assert [mark.text for mark in timeline.marks] == ["server 1 is out"]
    assert timeline.end.how == "done"
    assert lanes_of(timeline.spans) == ["trainer", "server 0", "server 1"]


def test_what_is_torn_or_unknown_is_passed_over(tmp_path):
    lines = [start_line(), {"kind": "weather", "at": BEGAN}, span_line(1, float("nan"), "waiting")]
    write_timeline(tmp_path, [*lines, span_line(1, 2, "waiting", step=1, colour="blue")])
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write('null\n[1]\n\nnot JSON\n{"kind": "span", "at": 18')
    timeline = read(tmp_path).timeline
    assert len(timeline.starts) == 1
    assert [(span.seconds, span.what, span.step) for span in timeline.spans] == [
        (2.0, "waiting", 1)
    ]


def test_a_server_s_span_belongs_to_no_step(tmp_path):
    write_timeline(tmp_path, [span_line(1, 2, "generating", "server 0", step=7)])
    (span,) = read(tmp_path).timeline.spans
    assert span.step is None


def test_after_a_kill_the_steps_that_were_taken_again_are_there_once(tmp_path):
    first = [span_line(step, 1, "waiting", step=step) for step in (1, 2, 3)]
    said = {"kind": "line", "at": BEGAN + 3, "step": 3, "level": "WARNING", "text": "first time"}
    again = [span_line(10 + step, 1, "waiting", step=step) for step in (3, 4)]
    end = {"kind": "end", "at": BEGAN + 4, "step": 3, "how": "failed", "text": "no space"}
    write_timeline(tmp_path, [start_line(), *first, said, end, start_line(2, BEGAN + 9), *again])
    timeline = read(tmp_path).timeline
    assert [span.step for span in timeline.spans] == [1, 2, 3, 4]
    assert timeline.spans[2].at == BEGAN + 13
    assert timeline.marks == []
    assert timeline.end is None, "it went on since"


def test_the_night_between_two_starts_is_cut_out(tmp_path):
    spans = [span_line(0, 5, "waiting", step=1), span_line(40_010, 5, "waiting", step=2)]
    said = {"kind": "line", "at": BEGAN + 40_012, "step": 2, "level": "WARNING", "text": "late"}
    write_timeline(
        tmp_path, [start_line(), spans[0], start_line(1, BEGAN + 40_000), spans[1], said]
    )
    timeline = uptime(read(tmp_path).timeline)
    assert [span.at - BEGAN for span in timeline.spans] == [0, 6]
    assert timeline.marks[0].at - BEGAN == 8


# -- trace ----------------------------------------------------------------------------------------


def test_a_trace_has_a_process_for_each_run_and_a_thread_for_each_lane(tmp_path):
    write_run(tmp_path / "a/version_0")
    write_metrics(tmp_path / "b/version_0", [step_row(1)])
    trace = json.loads(json.dumps(chrome_trace(read_runs([tmp_path / "a", tmp_path / "b"]))))
    events = trace["traceEvents"]
    names = [(e["name"], e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [
        ("process_name", 1, "a"),
        ("thread_name", 1, "trainer"),
        ("thread_name", 1, "server 0"),
        ("thread_name", 1, "server 1"),
        ("process_name", 2, "b"),
        ("thread_name", 2, "trainer"),
    ]
    spans = [e for e in events if e["ph"] == "X"]
    assert min(span["ts"] for span in spans) == 0
    place = {"ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 500_000}
    assert spans[0] == {"name": "waiting", "args": {"step": 1}} | place


def test_a_run_is_read_again_when_a_file_has_changed(tmp_path):
    write_run(tmp_path)
    before = stamp([tmp_path])
    assert stamp([tmp_path]) == before
    write_batch(tmp_path, 7, [group(0, [answer()])])
    assert stamp([tmp_path]) != before
