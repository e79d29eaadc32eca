"""Rows that ranks compute together: logprobs, gradients and runs of one rank, to rounding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_grpo.algorithm.batch import sequence_mean
from lightning_grpo.algorithm.layers import Replay
from lightning_grpo.policy.load import checkpoint_activations
from lightning_grpo.policy.packed import PackedPolicy, compile_blocks
from lightning_grpo.strategies.fsdp2 import parallelize, reshard
from tests.fakes.adapters import LORA, set_adapter
from tests.fakes.causal_models import make_model_of, make_sequences, pack
from tests.fakes.mixtures import SETTINGS, make_mixture
from tests.fakes.ranks import init_gloo, run_ranks
from tests.unit.policy.test_attention import DYNAMIC, PHI3

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 2}
LENGTHS = (7, 12, 31, 3, 2, 10)
ROUNDING = 1e-6
"""Relative, in fp32, of all logprobs and of the whole gradient."""


@dataclass(frozen=True)
class Case:
    """A model and the rows that it computes."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    does: str = ""


CASES = {
    "one key head": Case("qwen3", HEADS),
    "two key heads": Case("llama", HEADS | {"num_key_value_heads": 2}),
    "key heads that don't come out even": Case(
        "qwen3", {"num_attention_heads": 12, "num_key_value_heads": 3}
    ),
    "prompts computed once for each": Case("qwen3", HEADS, does="share nothing"),
    "one sequence": Case("qwen3", HEADS, (37,)),
    "fewer tokens than ranks": Case("qwen3", HEADS, (2,)),
    "checkpointed": Case("qwen3", HEADS, does="checkpoint"),
    "an adapter": Case("qwen3", HEADS, does="adapt"),
    "windows and caps": Case("gemma2", HEADS | {"sliding_window": 5}),
    "sinks": Case("gpt_oss", HEADS | SETTINGS["gpt_oss"] | {"sliding_window": 5}),
    "latent keys": Case("deepseek_v3", HEADS | {"num_key_value_heads": 4}),
    "factors of long rows": Case("phi3", HEADS | PHI3 | {"hidden_size": 64}),
    "factors that grow": Case(
        "llama", HEADS | {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}
    ),
    "compiled": Case("qwen3", HEADS, does="compile"),
    "experts": Case("qwen3_moe", HEADS | {"num_experts": 8}, does="replay"),
}


def make_policy(case: Case) -> PackedPolicy:
    if case.does == "replay":
        return PackedPolicy(make_mixture(case.kind, **case.settings), router_replay=True)
    model = make_model_of(case.kind, **case.settings)
    if case.does == "adapt":
        LORA.add_to(model)
        set_adapter(model)
    if case.does == "checkpoint":
        checkpoint_activations(model)
    return PackedPolicy(model, max_logits=7 * 61, share_prefixes=case.does != "share nothing")


def some_routes(num_tokens: int) -> Tensor:
    """Every third token's are not known."""
    scores = torch.rand(num_tokens, 2, 8, generator=torch.Generator().manual_seed(5))
    experts = scores.topk(2, -1).indices
    experts[::3] = -1
    return experts


def one_pass(case: Case, num_ranks: int) -> dict[str, Any]:
    """Of a loss that knows tokens and one that knows sequences."""
    policy = make_policy(case)
    if num_ranks > 1:
        mesh = init_device_mesh("cpu", (num_ranks,))
        parallelize(policy, mesh, sequence_parallel_size=num_ranks)
        if case.does == "compile":
            compile_blocks(policy.model, "aot_eager")
            policy.compiled = True
    ids, bounds = pack(make_sequences(case.lengths, shared=5))
    mask = torch.arange(len(ids)) % 4 > 0
    replay = Replay(some_routes(len(ids))) if case.does == "replay" else None
    logprobs, entropy = policy(
        ids, bounds, 0.7, with_entropy=True, positions_mask=mask, replay=replay
    )
    counts = None if replay is None else torch.tensor([*replay.counts, replay.num_choices])
    loss = logprobs.sin().sum() + entropy.cos().sum()
    loss = loss + sequence_mean(logprobs, mask, bounds).exp().square().sum()
    (loss * num_ranks).backward()
    reshard(policy)
    named = dict(policy.named_parameters())
    grads = [named[name].grad for name in sorted(named)]
    whole = [g if num_ranks == 1 else g.full_tensor() for g in grads if g is not None]
    flat = torch.cat([g.flatten() for g in whole])
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "gradient": flat,
            "counts": counts}  # fmt: skip


def passes(num_ranks: int, names: list[str]) -> list[dict[str, Any]]:
    init_gloo()
    return [one_pass(CASES[name], num_ranks) for name in names]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check(num_ranks: int, names: list[str]) -> None:
    expected = [one_pass(CASES[name], 1) for name in names]
    ranks = run_ranks(passes, num_ranks, num_ranks, names, timeout_s=150)
    for results in ranks:
        for name, found, alone in zip(names, results, expected, strict=True):
            for what in ("logprobs", "entropy", "gradient"):
                error = relative(found[what], alone[what])
                assert error <= ROUNDING, f"{error:.1e} in {what} of {name}"
    for name, *found, alone in zip(names, *ranks, expected, strict=True):
        if alone["counts"] is not None:
            assert torch.equal(sum(each["counts"] for each in found), alone["counts"]), name


@pytest.mark.timeout(120)
def test_a_row_on_two_ranks_has_the_logprobs_and_gradients_of_one():
    check(2, [name for name in CASES if name != "compiled"])


@pytest.mark.timeout(120)
def test_so_has_one_on_four_ranks_with_fewer_key_heads():
    check(4, ["one key head", "two key heads", "fewer tokens than ranks"])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_so_have_all_kinds_of_models(num_ranks):
    check(num_ranks, list(CASES))
