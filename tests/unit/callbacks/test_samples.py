"""Answers in loggers: a table, text, or nothing, by what the logger takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import MLFlowLogger

from lightning_grpo.callbacks.curve import prepare_loggers
from lightning_grpo.callbacks.samples import SampleTables, send
from lightning_grpo.types import NO_VERSION, Group, Prompt, Trajectory
from lightning_grpo.validation import EvaluationRecord


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
