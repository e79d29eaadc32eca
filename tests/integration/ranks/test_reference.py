"""The reference of a KL penalty on real ranks: sharded as the policy is, with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.algorithm.kl import K2, KLPenalty
from lightning_grpo.datamodule import ReplayDataModule
from tests.fakes.loops import Recorder, make_module, make_trainer
from tests.fakes.ranks import run_ranks
from tests.fakes.recordings import write_recording
from tests.fakes.tiny_lm import VOCAB, make_lm


def replay(folder: str, num_ranks: int, strategy: str) -> tuple[list[float], float]:
    """The penalty at each step, and the part of the reference's parameters that is held here."""
    import lightning_grpo.strategies.fsdp2  # noqa: F401 - registers the name

    kl = KLPenalty(0.5, K2(), reference=f"{folder}/reference", offload=True)
    module = make_module(f"{folder}/model", kl=kl)
    recorder = Recorder()
    trainer = make_trainer(
        Path(folder), devices=num_ranks, strategy=strategy, max_steps=-1, callbacks=[recorder]
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
