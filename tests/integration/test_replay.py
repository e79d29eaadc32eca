"""A run's recording trains again without servers: same batches, same losses."""

from __future__ import annotations

import zlib
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.errors import CheckpointError
from lightning_grpo.rollout.records import read_rows
from tests.fakes.loops import Recorder, make_data, make_module, make_trainer

TRAINED = ("policy/loss", "policy/grad_norm", "policy/entropy", "ratio/max", "reward/mean")
SIZES = {"minibatches_per_batch": 2, "passes_per_batch": 2}


def fit(model: Path, data, folder: Path, ckpt_path: str | None = None, **kwargs) -> Recorder:
    recorder = Recorder()
    callbacks = [recorder, *kwargs.pop("callbacks", [])]
    trainer = make_trainer(folder, callbacks=callbacks, **kwargs)
    trainer.fit(make_module(model), data, ckpt_path=ckpt_path)
    return recorder


def curves(recorder: Recorder) -> list[dict[str, float]]:
    # A batch whose groups have no spread trains on nothing and logs less.
    return [{name: step[name] for name in TRAINED if name in step} for step in recorder.metrics]


def keys(recorder: Recorder) -> list[tuple[int, list]]:
    return [(b.rollout.version, b.rollout.batch.keys) for b in recorder.batches]


def test_a_replay_has_the_batches_and_the_losses_of_the_recorded_run_and_ends_with_it(
    tiny_model, server, tmp_path
):
    live = fit(tiny_model, make_data(server, max_staleness=1, **SIZES), tmp_path, max_steps=12)
    replayed = fit(
        tiny_model, ReplayDataModule(str(tmp_path), **SIZES), tmp_path / "again", max_steps=10**6
    )
    assert len(live.metrics) == len(replayed.metrics) == 12
    assert keys(replayed) == keys(live)
    for ours, theirs in zip(curves(replayed), curves(live), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert len({round(step["policy/loss"], 7) for step in curves(live)}) > 3


def own_value(completion: str) -> float:
    """A reward that two different answers hardly share."""
    return zlib.crc32(completion.encode()) % 97


def test_each_token_is_recorded_with_what_the_policy_gave_it_when_it_trained(
    tiny_model, server, tmp_path
):
    data = make_data(server, own_value, minibatches_per_batch=2, max_staleness=0)
    module = make_module(tiny_model, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    make_trainer(tmp_path, max_steps=8).fit(module, data)
    moves = {"same weights": [], "a step later": []}
    for rows in (list(each) for _, each in groupby(read_rows(tmp_path), itemgetter("step"))):
        for row in rows:
            of = "same weights" if row["group"] == 0 else "a step later"
            pairs = zip(row["policy_logprobs"], row["logprobs"], strict=False)
            moves[of] += [
                abs(now - then)
                for (now, then), sampled in zip(pairs, row["response_mask"], strict=False)
                if sampled
            ]
    assert moves["same weights"]
    assert max(moves["same weights"]) < 1e-4 < max(moves["a step later"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_replay_goes_on_from_a_checkpoint_of_the_run_or_of_a_replay(tiny_model, server, tmp_path):
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    live = fit(
        tiny_model,
        make_data(server),
        tmp_path,
        max_steps=4,
        callbacks=[saved],
        enable_checkpointing=True,
    )
    middle = str(tmp_path / "step=2.ckpt")
    replayed = fit(
        tiny_model, ReplayDataModule(str(tmp_path)), tmp_path / "again", middle, max_steps=100
    )
    assert keys(replayed) == keys(live)[2:]
    for ours, theirs in zip(curves(replayed), curves(live)[2:], strict=True):
        assert "policy/loss" in ours
        # The recorded run still shows what its earlier steps logged and this one did not.
        assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-6)


def test_a_folder_without_a_recording_is_named(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="No trajectories at"):
        fit(tiny_model, ReplayDataModule(str(tmp_path)), tmp_path)
