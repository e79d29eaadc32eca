"""The same recorded rollout batches, however they are cut: one loss, one gradient, one curve.

Real ranks, the real Trainer, module, loader and strategies; only the rollouts are recorded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_grpo.algorithm.corrections import SequenceTIS, TokenTIS
from lightning_grpo.algorithm.losses import (
    CISPOLoss,
    ConstantLength,
    GRPOLoss,
    GSPOLoss,
    SequenceMean,
    TokenMean,
)
from lightning_grpo.datamodule import ReplayDataModule
from lightning_grpo.module import GRPOModule
from tests.fakes.ranks import run_ranks
from tests.fakes.recordings import write_recording
from tests.fakes.tiny_lm import VOCAB, make_lm

BATCHES = 2
# In fp32 the weight of a sequence is the product of the rounding of all of its tokens.
TOLERANCE = {"float32": 4e-6, "float64": 1e-12}
MEASURED = ("time/", "health/", "idle/", "throughput/")


@dataclass(frozen=True)
class Case:
    """One way to cut one recording."""

    seed: int
    max_tokens: int
    dtype: str
    sharded: bool = False
    shard_size: int | None = None
    row_ranks: int = 1


@dataclass
class Seen:
    """What one run computed, in order."""

    advantages: list[tuple[torch.Tensor, torch.Tensor]]
    gradients: list[torch.Tensor]
    metrics: list[dict[str, float]]
    num_micro_batches: list[int]


def in_fp64(model: nn.Module) -> nn.Module:
    """All of it: transformers' norms would round to fp32 in between."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if "RMSNorm" in type(norm).__name__:
                whole = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                whole.weight = norm.weight
                setattr(parent, name, whole)
    return model.double()


class Watched(GRPOModule):
    """Keeps what it computes."""

    def __init__(self, folder: str, dtype: str, **kwargs: Any) -> None:
        super().__init__(folder, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), **kwargs)
        self.dtype_name = dtype
        self.seen = Seen([], [], [], [])

    def build_policy(self):
        policy = super().build_policy()
        return in_fp64(policy) if self.dtype_name == "float64" else policy

    def advantages(self, rewards, group_ids):
        self.seen.advantages.append((rewards, group_ids))
        return super().advantages(rewards, group_ids)

    def log_dict(self, dictionary, *args: Any, **kwargs: Any) -> None:
        kept = {k: v for k, v in dictionary.items() if not k.startswith(MEASURED)}
        if kept:
            self.seen.metrics.append(kept)
        super().log_dict(dictionary, *args, **kwargs)

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.seen.num_micro_batches.append(batch.num_micro_batches)

    def on_before_optimizer_step(self, optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        grads = [p.grad for p in self.parameters()]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        self.seen.gradients.append(torch.cat([g.flatten().double() for g in whole]))


def settings(seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments of the module and of the data module for a seed."""
    draw = random.Random(seed)
    aggregation = draw.choice([TokenMean(), SequenceMean(), ConstantLength(40)])
    loss = draw.choice(
        [
            GRPOLoss(0.2, 0.28, aggregation=aggregation),
            GSPOLoss(0.03, 0.04, aggregation=aggregation),
            CISPOLoss(0.2, 0.28, aggregation=aggregation),
        ]
    )
    module = {
        "loss": loss,
        "correction": draw.choice([None, TokenTIS(2.0), SequenceTIS(5.0)]),
        "entropy_coefficient": draw.choice([0.0, 0.01]),
    }
    sizes = {
        "minibatches_per_batch": draw.choice([1, 2]),
        "passes_per_batch": draw.choice([1, 2]),
    }
    return module, sizes


def replay(case: Case, folder: Path, num_ranks: int) -> Seen:
    from lightning_grpo.strategies.fsdp2 import FSDP2Strategy

    arguments, sizes = settings(case.seed)
    plain = "ddp" if num_ranks > 1 else "auto"
    sharding = FSDP2Strategy(shard_size=case.shard_size, sequence_parallel_size=case.row_ranks)
    module = Watched(
        str(folder / "model"), case.dtype, max_tokens_per_microbatch=case.max_tokens, **arguments
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=sharding if case.sharded else plain,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder / "run"),
        gradient_clip_val=0.5,
    )
    trainer.fit(module, ReplayDataModule(str(folder / f"recording-{case.seed}"), **sizes))
    steps = BATCHES * sizes["minibatches_per_batch"] * sizes["passes_per_batch"]
    assert trainer.global_step == steps
    return module.seen


def replay_all(cases: list[tuple[Any, ...]], folder: str, num_ranks: int) -> list[dict[str, Any]]:
    return [vars(replay(Case(*case), Path(folder), num_ranks)) for case in cases]


def difference(ours: Seen, whole: Seen) -> tuple[float, str]:
    """The largest norm of the difference of a gradient, or difference of a metric, and which."""
    assert len(ours.gradients) == len(whole.gradients)
    assert len(ours.metrics) == len(whole.metrics)
    worst = []
    for k, (a, b) in enumerate(zip(ours.gradients, whole.gradients, strict=True)):
        worst.append((float((a - b).norm()), f"gradient {k}"))
    for k, (found, expected) in enumerate(zip(ours.metrics, whole.metrics, strict=True)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            worst.append((abs(found[name] - value) / max(1.0, abs(value)), f"{name}, log {k}"))
    return max(worst)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recordings")
    make_lm(seed=5, heads=4).save_pretrained(path / "model")
    for seed in SEEDS:
        temperature = random.Random(seed).choice([1.0, 0.7])
        write_recording(
            path / f"recording-{seed}",
            seed,
            batches=BATCHES,
            groups=4,
            vocab=VOCAB,
            temperature=temperature,
        )
    return path


SEEDS = range(4)
WHOLE, FEW, MANY = 10**6, 150, 40


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_two_and_three_ranks_and_every_cut_give_the_same_loss_gradient_and_metrics(folder):
    cases = [
        Case(seed, max_tokens, dtype, sharded)
        for seed in SEEDS
        for dtype, sharded in (("float64", False), ("float32", True))
        for max_tokens in (WHOLE, FEW if seed % 2 else MANY)
    ]
    plain = [astuple(case) for case in cases]  # ranks know this file by another name
    with ThreadPoolExecutor(3) as starts:  # all at once: what takes long is the import
        futures = [
            starts.submit(run_ranks, replay_all, n, plain, str(folder), n, timeout_s=240)
            for n in (1, 2, 3)
        ]
        by_count = [future.result() for future in futures]
    expected = {
        (case.seed, case.dtype): Seen(**seen)
        for case, seen in zip(cases, by_count[0][0], strict=True)
        if case.max_tokens == WHOLE
    }
    cuts = set()
    for ranks in by_count:
        for results in ranks:
            for case, found in zip(cases, results, strict=True):
                seen, whole = Seen(**found), expected[case.seed, case.dtype]
                worst, name = difference(seen, whole)
                said = f"{case}, {len(ranks)} ranks: {worst:.2e} in {name}"
                assert worst <= TOLERANCE[case.dtype], said
                cuts.add((case.seed, len(ranks), *seen.num_micro_batches))
                for (rewards, ids), (first_rewards, first_ids) in zip(
                    seen.advantages, whole.advantages, strict=True
                ):
                    assert torch.equal(rewards, first_rewards)
                    assert torch.equal(ids, first_ids)
    assert all(float(g.norm()) > 0.01 for seen in expected.values() for g in seen.gradients)
    assert len(cuts) >= 3 * len(SEEDS)  # they were cut differently indeed


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_shards_within_rows_of_ranks_give_the_loss_gradient_and_metrics_of_one(folder):
    whole = [astuple(Case(seed, WHOLE, "float32")) for seed in SEEDS]
    rows = [astuple(Case(seed, MANY, "float32", sharded=True, shard_size=2)) for seed in SEEDS]
    (expected,) = run_ranks(replay_all, 1, whole, str(folder), 1, timeout_s=90)
    for results in run_ranks(replay_all, 4, rows, str(folder), 4, timeout_s=150):
        for found, alone in zip(results, expected, strict=True):
            worst, name = difference(Seen(**found), Seen(**alone))
            assert worst <= TOLERANCE["float32"], name


def check_together(
    folder: Path, num_ranks: int, row_ranks: int, shard_size: int | None, seeds: Sequence[int]
) -> None:
    whole = [astuple(Case(seed, WHOLE, "float32")) for seed in seeds]
    rows = [
        astuple(Case(seed, MANY if seed % 2 else WHOLE, "float32", True, shard_size, row_ranks))
        for seed in seeds
    ]
    (expected,) = run_ranks(replay_all, 1, whole, str(folder), 1, timeout_s=120)
    for results in run_ranks(replay_all, num_ranks, rows, str(folder), num_ranks, timeout_s=180):
        for found, alone in zip(results, expected, strict=True):
            worst, name = difference(Seen(**found), Seen(**alone))
            assert worst <= TOLERANCE["float32"], name


@pytest.mark.timeout(120)
def test_two_ranks_that_compute_rows_together_give_the_loss_gradient_and_metrics_of_one(folder):
    check_together(folder, 2, 2, None, [0])  # a loss of sequences


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("num_ranks", "row_ranks", "shard_size"), [(2, 2, None), (4, 2, None), (4, 2, 2), (4, 4, None)]
)
def test_so_do_pairs_of_ranks_and_four_with_every_loss(folder, num_ranks, row_ranks, shard_size):
    check_together(folder, num_ranks, row_ranks, shard_size, SEEDS)
