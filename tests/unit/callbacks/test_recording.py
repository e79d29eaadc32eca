""""""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import MLFlowLogger

from lightning_grpo.callbacks.curve import prepare_loggers
from lightning_grpo.callbacks.recording import (
    FinalCheckpoint,
    SampleTables,
    TimelineWriter,
    TrajectoryWriter,
    send,
)
from lightning_grpo.errors import CheckpointError, ConfigError, StopRun
from lightning_grpo.rollout.records import read_rows
from lightning_grpo.types import NO_VERSION, Group, Prompt, ServerActivity, Trajectory
from lightning_grpo.validation import EvaluationRecord
from tests.fakes.rank_forkserver import python_with_imports
from tests.fakes.recordings import read_groups
from tests.fakes.tiny_run import TinyData, TinyEvaluation, TinyModule, make_group


def test_each_rollout_batch_is_one_file_named_by_its_last_step(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=2))
    files = sorted((tmp_path / "trajectories").iterdir())
    assert [file.name for file in files] == ["step_000002.parquet", "step_000004.parquet"]
    assert [(row["step"], row["version"]) for row in read_rows(files[1])] == [(4, 1)] * 4


def test_what_was_consumed_can_be_read_back(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert read_groups(tmp_path) == [[make_group(0), make_group(1)]]


def test_each_trajectory_is_written_with_its_advantage(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    rows = read_rows(tmp_path / "trajectories")
    assert [(row["reward"], row["advantage"]) for row in rows] == [(0, -1), (1, 1)] * 2


def test_one_advantage_per_token_is_not_written(make_trainer, tmp_path):
    class PerToken(TinyData):
        def train_dataloader(self):
            for batch in super().train_dataloader():
                batch.rollout.advantages = torch.zeros(16)
                yield batch

    trainer = make_trainer(callbacks=[TrajectoryWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=PerToken(num_rollouts=1))
    assert {row["advantage"] for row in read_rows(tmp_path / "trajectories")} == {None}


def test_only_every_nth_rollout_batch_is_written_when_asked(make_trainer, tmp_path):
    writer = TrajectoryWriter(folder=str(tmp_path / "kept"), every_n_batches=2)
    trainer = make_trainer(callbacks=[writer], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=3))
    names = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert names == ["step_000002.parquet", "step_000006.parquet"]


def test_a_file_that_can_t_be_written_is_told_once_and_the_run_goes_on(
    make_trainer, tmp_path, caplog
):
    class Mending(Callback):
        """Makes room before the last rollout batch."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                for thread in threading.enumerate():
                    if thread.name.startswith("trajectories"):  # that writes beside the steps
                        thread.join()
                (tmp_path / "kept").unlink()

    (tmp_path / "kept").touch()  # a file where the folder should be: like a full disk, an OSError
    callbacks = [TrajectoryWriter(folder=str(tmp_path / "kept")), Mending()]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=3))
    assert trainer.global_step == 6
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["step_000006.parquet"]
    told = [r.getMessage() for r in caplog.records if r.name.endswith("recording")]
    assert len(told) == 2
    assert "step_000002.parquet can't be written (" in told[0]
    assert "written again" in told[1]


def test_a_file_is_there_before_the_checkpoint_that_follows_it(make_trainer, tmp_path):
    class Slow(TrajectoryWriter):
        def _write(self, *args, **about) -> None:
            time.sleep(0.3)
            super()._write(*args, **about)

    class Saving(Callback):
        def __init__(self) -> None:
            self.found = []

        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")
                self.found = [file.name for file in (tmp_path / "kept").glob("*.parquet")]

    saving = Saving()
    callbacks = [Slow(folder=str(tmp_path / "kept")), saving]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert saving.found == ["step_000002.parquet"]


def test_what_no_disk_is_to_blame_for_ends_the_run(make_trainer, tmp_path):
    class Wrong(TrajectoryWriter):
        def _write(self, *args, **about) -> None:
            raise TypeError("a column can't hold that")

    callbacks = [Wrong(folder=str(tmp_path / "kept"))]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=False)
    with pytest.raises(TypeError, match="can't hold that"):
        trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=3))


def test_an_interval_of_zero_is_refused():
    with pytest.raises(ConfigError, match="`every_n_batches` must be >= 1, got 0"):
        TrajectoryWriter(every_n_batches=0)


def test_held_out_answers_are_kept_beside_and_not_replayed(make_trainer, tmp_path):
    answered = {"easy": [make_group(1)], "hard": [make_group(2, version=3)]}
    data = TinyData(evaluations=[TinyEvaluation(30, {}, answered)])
    trainer = make_trainer(
        callbacks=[TrajectoryWriter(str(tmp_path / "kept"))], limit_val_batches=1
    )
    trainer.validate(TinyModule(), datamodule=data)
    rows = read_rows(tmp_path / "kept" / "held_out")
    assert [(row["step"], row["row"], row["outcome"]) for row in rows[::2]] == [
        (30, 1, "held out"),
        (30, 2, "held out"),
    ]
    with pytest.raises(CheckpointError, match="No trajectories"):
        read_rows(tmp_path / "kept")


# ---- timeline -----------------------------------------------------------------------------------


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


def test_a_run_that_fails_hears_nothing_of_the_next(make_trainer):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            raise ValueError("odd")

    before = list(logging.getLogger("lightning_grpo").handlers)
    trainer = make_trainer(callbacks=[TimelineWriter(), Fails()], enable_progress_bar=False)
    with pytest.raises(ValueError, match="odd"):
        trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert logging.getLogger("lightning_grpo").handlers == before


def test_a_malformed_warning_ends_nothing(make_trainer, tmp_path, capsys):
    class Malformed(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            # %-style arguments that don't fit: the standard library tells and goes on.
            record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%d", ("three",), None)
            (listener,) = logging.getLogger("lightning_grpo").handlers
            listener.handle(record)

    trainer = make_trainer(callbacks=[TimelineWriter(), Malformed()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert trainer.global_step == 2
    assert "--- Logging error ---" in capsys.readouterr().err


def test_what_servers_did_is_a_lane_each(make_trainer, tmp_path):
    class Served(TinyData):
        def server_activities(self, *, ongoing=False):
            now = [ServerActivity(1, "out", 102.0, 1.0)] if ongoing else []
            return [ServerActivity(1, "generating", 100.0, 2.0), *now]

    trainer = make_trainer(callbacks=[TimelineWriter()], enable_progress_bar=False)
    trainer.fit(TinyModule(), datamodule=Served(num_rollouts=1))
    records = [r for r in read(tmp_path) if r.get("lane") == "server 1"]
    done = [(r["what"], r["at"], r["s"]) for r in records]
    assert set(done[:-1]) == {("generating", 100.0, 2.0)}
    assert done[-1] == ("out", 102.0, 1.0)  # what it does while the run ends


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


def test_a_run_that_is_refused_before_its_first_step_leaves_no_timeline(make_trainer, tmp_path):
    class Refuses(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            raise ConfigError("model.optimizer.lr", "must be >= 0", -1)

    trainer = make_trainer(callbacks=[TimelineWriter(), Refuses()], enable_progress_bar=False)
    with pytest.raises(ConfigError):
        trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert not (tmp_path / "timeline.jsonl").exists()


def test_a_run_that_ends_before_its_folder_is_known_is_told_as_it_is(make_trainer, tmp_path):
    class Refuses(Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            raise ValueError("not like this")

    trainer = make_trainer(callbacks=[Refuses(), TimelineWriter()], enable_progress_bar=False)
    with pytest.raises(ValueError, match="not like this"):
        trainer.fit(TinyModule(), datamodule=TinyData(num_rollouts=1))
    assert not (tmp_path / "timeline.jsonl").exists()


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


# ---- the end of training leaves a checkpoint of the last step -----------------------------------


def fit(folder, *callbacks, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FinalCheckpoint(), *callbacks],
        **options,
    )
    trainer.fit(BoringModel())
    return sorted(path.name for path in folder.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore")
def test_steps_after_the_last_validation_are_saved(tmp_path):
    saved = fit(tmp_path, ModelCheckpoint(every_n_train_steps=3))
    assert "final-step=5.ckpt" in saved


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path):
    saved = fit(tmp_path, ModelCheckpoint(every_n_train_steps=5))
    assert not [name for name in saved if name.startswith("final")]


@pytest.mark.filterwarnings("ignore")
def test_what_another_run_has_saved_in_the_same_folder_stays(tmp_path):
    for _ in range(2):
        fit(tmp_path, ModelCheckpoint(every_n_train_steps=3))
    saved = fit(tmp_path, ModelCheckpoint(every_n_train_steps=3))
    finals = [name for name in saved if name.startswith("final")]
    assert finals == ["final-step=5-v1.ckpt", "final-step=5-v2.ckpt", "final-step=5.ckpt"]


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_without_checkpoints_stays_without(tmp_path):
    assert fit(tmp_path, enable_checkpointing=False) == []


WARNS = """
import logging
from types import SimpleNamespace
from lightning.pytorch.trainer.states import TrainerFn
from lightning_grpo.callbacks.recording import TimelineWriter
writer = TimelineWriter()
trainer = SimpleNamespace(is_global_zero=True, global_step=0, loggers=[], default_root_dir=".")
trainer.strategy = SimpleNamespace(broadcast=lambda value: value)
trainer.log_dir, trainer.datamodule = ".", None
writer.setup(trainer, None, TrainerFn.FITTING)
for own in (False, True):
    if own:
        logging.basicConfig(format="own %(message)s")
    logging.getLogger("lightning_grpo.serving.health").warning("server %d is out", own)
    logging.getLogger("lightning_grpo.serving.health").info("not this")
"""


def test_a_warning_that_is_recorded_is_on_the_screen_too_and_only_once(tmp_path):
    (tmp_path / "warns.py").write_text(WARNS)
    command = python_with_imports(str(tmp_path / "warns.py"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "server" in line or "not this" in line]
    assert said == ["server 0 is out", "own server 1 is out"]


# -- answers in loggers: a table, text, or nothing, by what the logger takes -----------------------


class Tables:
    def __init__(self):
        self.tables = []

    def log_table(self, key, columns, data, step):
        self.tables.append((key, columns, data, step))


class Board:
    """Of TensorBoard's shape, on a disk that may be full."""

    def __init__(self, full=False):
        self.texts, self.full = [], full
        self.experiment = SimpleNamespace(add_text=self.add)

    def add(self, key, text, step):
        if self.full:
            raise OSError(28, "No space left on device")
        self.texts.append((key, text, step))


class Files:
    """Of MLflow's shape."""

    run_id = "run-1"

    def __init__(self):
        self.files = {}
        self.experiment = SimpleNamespace(
            log_text=lambda run, text, path: self.files.update({(run, path): text})
        )


def group(text, rewards=(1.0, 0.0)):
    trajectories = tuple(
        Trajectory(
            input_ids=(1, 2),
            response_mask=(False, True),
            logprobs=(0.0, -1.0),
            versions=(NO_VERSION, 0),
            reward=reward,
            rewards={"score": reward},
            text=f"{text} is {reward:g}",
            truncated=reward == 0,
        )
        for reward in rewards
    )
    return Group(Prompt((1,), f"{text}?\n", row=0), trajectories, admitted_version=0)


def log_both(callback, *loggers):
    """A validation at step 7 and a rollout batch at step 8."""
    record = EvaluationRecord(7, {}, {"": [group("a"), group("b")], "hard": [group("c")]})
    data = SimpleNamespace(evaluations=[record])
    trainer = SimpleNamespace(datamodule=data, loggers=loggers, global_step=8)
    callback.on_validation_end(trainer, None)
    for index in range(3):
        rollout = SimpleNamespace(index=index, groups=[group(f"r{index}", (0.0, 1.0))])
        batch = SimpleNamespace(is_last=True, rollout=rollout)
        callback.on_train_batch_end(trainer, None, None, batch, index)


def test_a_logger_of_tables_gets_the_first_answer_to_the_same_prompts_each_time():
    tables = Tables()
    log_both(SampleTables(rows=1, every_n_batches=2), tables)
    columns = ["prompt", "completion", "reward", "truncated"]
    assert tables.tables == [
        ("held_out", columns, [["a?\n", "a is 1", 1.0, False]], 7),
        ("held_out/hard", columns, [["c?\n", "c is 1", 1.0, False]], 7),
        ("sampled", columns, [["r0?\n", "r0 is 0", 0.0, True]], 8),
        ("sampled", columns, [["r2?\n", "r2 is 0", 0.0, True]], 8),
    ]


def test_loggers_of_text_get_it_with_markup_as_text():
    board, files = Board(), Files()
    rows = [("<b>|1|</b>\n", "```\n# 2", 0.5, True)]
    for logger in (board, files):
        send(logger, "sampled", rows, 3)
    text = "**reward 0.5**, cut off\n\n    <b>|1|</b>\n    ```\n    # 2"
    assert board.texts == [("sampled", text, 3)]
    assert files.files == {("run-1", "sampled/step_000003.md"): text}


def test_other_loggers_get_nothing_and_a_full_disk_ends_no_run(caplog):
    bare, plain = SimpleNamespace(), SimpleNamespace(experiment=object())
    full, tables = Board(full=True), Tables()
    log_both(SampleTables(), bare, plain, full, tables)
    assert len(tables.tables) == 3
    assert "answers in Board can't be written (No space left on device)" in caplog.text


@pytest.mark.parametrize("setting", ["rows", "every_n_batches"])
def test_a_number_below_one_is_refused(setting):
    with pytest.raises(ValueError, match=f"`{setting}`"):
        SampleTables(**{setting: 0})


class Sent(MLFlowLogger):
    """Lightning's, without a service: what reaches it."""

    def __init__(self):
        self.sent = {}

    def log_metrics(self, metrics, step=None):
        self.sent[step] = metrics


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("eval/avg_at_1", "eval/avg_at_1"),
        ("eval/gsm8k (hard)/avg_at_1", "eval/gsm8k_hard_/avg_at_1"),
        ("reward/gr\u00f6\u00dfe/mean", "reward/gr_xf6_xdfe/mean"),
        ("reward/\u4e2d/mean", "reward/_u4e2d/mean"),
        ("reward/../mean", "reward/_/mean"),
        ("reward//mean", "reward/_/mean"),
    ],
)
def test_mlflow_gets_names_that_it_takes_each_its_own(name, sent):
    logger = Sent()
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True, state=SimpleNamespace(fn=None))
    for _ in range(2):  # a fit and a validation
        prepare_loggers(trainer)
    logger.log_metrics(metrics={name: 0.5}, step=3)
    assert logger.sent == {3: {sent: 0.5}}


def test_mlflow_gets_files_by_names_that_it_takes():
    files = Files()
    send(files, "held_out/..", [("a?", "1", 1.0, False)], 7)
    assert list(files.files) == [("run-1", "held_out/_/step_000007.md")]
