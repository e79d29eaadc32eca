"""Validation on real ranks: several held-out sets, two ranks as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.algorithm.losses import K2, KLPenalty
from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.rollout.records import read_rows
from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.validation import Evaluation
from tests.fakes.loops import Recorder, make_data, make_module, make_prompts, make_trainer
from tests.fakes.ranks import run_ranks
from tests.fakes.recordings import write_recording
from tests.fakes.tiny_lm import VOCAB, make_lm


def last_letter(text: str) -> str | None:
    return text[-1:] or None


def evaluate(model: str, folder: str, num_ranks: int) -> list[dict[str, Any]]:
    """What `fit` scored before and after two steps, then what `validate` did."""
    data = make_data(
        EmbeddedServers(),
        val_prompts={"easy": make_prompts(5), "hard": make_prompts(7)},
        evaluation=Evaluation(num_samples=4, greedy=True, extract_answer=last_letter),
    )
    settings = {
        "devices": num_ranks,
        "strategy": "ddp" if num_ranks > 1 else "auto",
        "val_check_interval": 2,
        "deterministic": True,
    }
    make_trainer(Path(folder), **settings).fit(make_module(model), data)
    trainer = make_trainer(Path(folder), **settings)
    trainer.validate(make_module(model), data)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    records = [record.metrics for record in data.evaluations]
    assert {k: v for k, v in logged.items() if k.startswith("eval/")} == pytest.approx(records[-1])
    return records


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_score_several_sets_as_one_does(tiny_model, tmp_path):
    one, *two = (
        result
        for n in (1, 2)
        for result in run_ranks(evaluate, n, str(tiny_model), str(tmp_path), n, timeout_s=110)
    )
    before, after, validated = one
    names = {"avg_at_4", "pass_at_2", "pass_at_4", "maj_at_4", "greedy"}
    for name in ("easy", "hard"):
        assert {f"eval/{name}/{metric}" for metric in names} <= before.keys()
    assert before == validated, "the same weights, asked in training and by validate"
    assert two[0] == two[1], "all ranks have the same values"
    for found in (two[0][0], two[0][2]):
        assert found == pytest.approx(before, abs=1e-12)
    assert two[0][1].keys() == after.keys()


# ---- the reference of a KL penalty ----


def replay(folder: str, num_ranks: int, strategy: str) -> tuple[list[float], float]:
    """The penalty at each step, and the part of the reference's parameters that is held here."""
    import lightning_grpo.strategies.fsdp2  # noqa: F401 - registers the name

    kl = KLPenalty(0.5, K2(), reference=f"{folder}/reference", offload=True)
    module = make_module(f"{folder}/model", kl=kl)
    recorder = Recorder()
    trainer = make_trainer(
        Path(folder, str(num_ranks)),
        devices=num_ranks,
        strategy=strategy,
        max_steps=-1,
        callbacks=[recorder],
    )
    trainer.fit(module, ReplayDataModule(f"{folder}/recording"))
    held = list(module._reference._policy.parameters())
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in held)
    seen = [metrics["policy/kl_reference"] for metrics in recorder.metrics]
    return seen, local / sum(p.numel() for p in held)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_sharded_reference_gives_the_penalty_of_a_whole_one_and_is_held_in_parts(tmp_path):
    disable_progress_bar()  # its monitor thread would outlive the test
    make_lm(seed=5).save_pretrained(tmp_path / "model")
    make_lm(seed=6).save_pretrained(tmp_path / "reference")
    write_recording(tmp_path / "recording", 0, batches=3, groups=4, vocab=VOCAB)
    ((whole, held),) = run_ranks(replay, 1, str(tmp_path), 1, "auto", timeout_s=80)
    assert held == 1.0
    assert len(whole) == 3
    assert min(whole) > 1e-3
    for seen, part in run_ranks(replay, 2, str(tmp_path), 2, "fsdp2", timeout_s=80):
        assert torch.allclose(torch.tensor(seen), torch.tensor(whole), atol=1e-6)
        assert part < 0.55
    # What the policy gave is recorded of all ranks' trajectories.
    alone, shared = (read_rows(tmp_path / ranks) for ranks in ("1", "2"))
    assert any(row["policy_logprobs"] for row in alone)
    for one, other in zip(alone, shared, strict=True):
        assert one["policy_logprobs"] == pytest.approx(other["policy_logprobs"], abs=1e-5)
