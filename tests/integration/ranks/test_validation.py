"""Validation on real ranks: several held-out sets, two ranks as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_grpo.servers.process import EmbeddedServers
from lightning_grpo.validation import Evaluation
from tests.fakes.loops import make_data, make_module, make_prompts, make_trainer
from tests.fakes.ranks import run_ranks


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
