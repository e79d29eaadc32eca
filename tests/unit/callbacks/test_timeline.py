from __future__ import annotations

import json
import logging

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_grpo.callbacks.recording import TimelineWriter
from lightning_grpo.errors import StopRun
from lightning_grpo.types import ServerActivity
from tests.fakes.tiny_run import TinyData, TinyEvaluation, TinyModule


def read(folder):
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]


def spans(records, lane="trainer"):
    return [(r["what"], r["step"]) for r in records if r["kind"] == "span" and r["lane"] == lane]


class Warns(Callback):
    """Says something during the second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            logging.getLogger("lightning_grpo.serving.health").warning("server 0 is out")
            logging.getLogger("lightning_grpo.serving.health").info("nothing of note")


def test_each_part_of_each_step_is_a_span_under_the_number_on_the_screen(make_trainer, tmp_path):
    logged = {"time/weight_sync_s": 0.25}
    trainer = make_trainer(callbacks=[TimelineWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(logged), datamodule=TinyData(num_rollouts=2))
    records = read(tmp_path)
    parts = ["forward and backward", "optimizer"]
    assert spans(records) == [
        (what, step)
        for first, last in ((1, 2), (3, 4))
        for what, step in [
            ("waiting", first),
            *((part, first) for part in parts),
            *((part, last) for part in parts),
            ("weight sync", last),
        ]
    ]
    (waited, *_, synced) = [r for r in records if r["kind"] == "span"]
    assert (waited["s"], synced["s"]) == (pytest.approx(0.5), pytest.approx(0.25))
    assert (records[0]["kind"], records[-1]["kind"]) == ("start", "end")
    assert records[-1]["how"] == "done"


def test_what_was_resolved_and_with_which_versions_is_in_its_first_line(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TimelineWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    start = read(tmp_path)[0]
    assert start["described"]["model"] == "tiny (1 parameter, float32)"
    assert {"python", "torch", "transformers"} <= set(start["versions"])
    assert "CPU cores" in start["machine"]


def test_a_warning_of_the_package_is_kept_with_its_step(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TimelineWriter(), Warns()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    lines = [r for r in read(tmp_path) if r["kind"] == "line"]
    assert [(r["step"], r["level"], r["text"]) for r in lines] == [
        (2, "WARNING", "server 0 is out")
    ]
    assert not [h for h in logging.getLogger("lightning_grpo").handlers if "Listener" in repr(h)]


def test_what_servers_did_is_a_lane_each(make_trainer, tmp_path):
    class Served(TinyData):
        def server_activities(self):
            return [ServerActivity(1, "generating", 100.0, 2.0)]

    trainer = make_trainer(callbacks=[TimelineWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=Served(num_rollouts=1))
    records = [r for r in read(tmp_path) if r.get("lane") == "server 1"]
    assert {(r["what"], r["at"], r["s"]) for r in records} == {("generating", 100.0, 2.0)}


def test_a_validation_is_a_span_of_the_step_it_followed(make_trainer, tmp_path):
    data = TinyData(num_rollouts=1, evaluations=[TinyEvaluation(step=2, metrics={})])
    trainer = make_trainer(
        callbacks=[TimelineWriter()], enable_progress_bar=False, limit_val_batches=1
    )
    trainer.fit(TinyModule(), datamodule=data)
    assert [s for s in spans(read(tmp_path)) if s[0] == "validation"] == [("validation", 2)]


@pytest.mark.parametrize(
    ("error", "how"), [(StopRun("SIGTERM: stopped"), "stopped"), (ValueError("no"), "failed")]
)
def test_what_ended_a_run_is_its_last_line(make_trainer, tmp_path, error, how):
    class Ends(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == 2:
                raise error

    trainer = make_trainer(callbacks=[TimelineWriter(), Ends()], enable_progress_bar=False)
    with pytest.raises(type(error)):
        trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=2))
    end = read(tmp_path)[-1]
    assert (end["kind"], end["how"], end["text"], end["step"]) == ("end", how, str(error), 2)


def test_a_run_that_goes_on_appends(make_trainer, tmp_path):
    for _ in range(2):
        trainer = make_trainer(callbacks=[TimelineWriter()], enable_progress_bar=False)
        trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert [r["kind"] for r in read(tmp_path)].count("start") == 2


def test_validate_records_nothing(make_trainer, tmp_path):
    trainer = make_trainer(
        callbacks=[TimelineWriter()], enable_progress_bar=False, limit_val_batches=1
    )
    trainer.validate(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert not (tmp_path / "timeline.jsonl").exists()


def test_a_timeline_that_can_t_be_written_is_told_once_and_the_run_goes_on(
    make_trainer, tmp_path, caplog
):
    (tmp_path / "timeline.jsonl").mkdir()  # like a full disk, an OSError
    trainer = make_trainer(callbacks=[TimelineWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=2))
    assert trainer.global_step == 4
    told = [r.getMessage() for r in caplog.records if r.name.endswith("recording")]
    assert len(told) == 1
    assert "timeline.jsonl can't be written (Is a directory)" in told[0]
