"""What is certified, and what a check says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_grpo.engine.model import ModelRunner, load_model, require_goes_on
from lightning_grpo.naming import CheckpointNames
from lightning_grpo.policy.load import export_policy
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.weights.gather import gather_weights, make_buckets, unpack

LOGPROB_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-6
"""Of fp32 logprobs, absolute; of fp64 gradients, relative to each parameter's own."""
APART_LIMIT = 1e-5
"""Of fp32 logprobs: what the order of sums makes of them where experts get other tokens."""
_BUCKET_BYTES = 50_000
"""So few that a tiny model's weights travel in several."""

Verdict = Literal["ok", "refused", "WRONG", "skipped", "untried"]


@dataclass(frozen=True)
class CheckLine:
    """What one check found.

    Attributes:
        check: Its name.
        verdict: `skipped` where the model has no such part, which is no failure; `untried` where
            nothing is known of it.
        found: In words.
        figure: The largest difference, where one was measured.
        limit: What it may be.
    """

    check: str
    verdict: Verdict
    found: str
    figure: float | None = None
    limit: float | None = None


def measured(check: str, figure: float, limit: float, found: str) -> CheckLine:
    """A line whose verdict is its figure's; what is not finite is wrong."""
    verdict: Verdict = "ok" if math.isfinite(figure) and figure <= limit else "WRONG"
    return CheckLine(check, verdict, found, figure, limit)


def difference(left: Tensor, right: Tensor) -> float:
    """The largest of all elements; not a number where there is one."""
    return (left.double() - right.double()).abs().max().item()


def _serve(folder: str) -> ModelRunner:
    runner = ModelRunner(load_model(folder))
    require_goes_on(runner)
    return runner


def _export(policy: nn.Module, folder: Path) -> None:
    model: Any = policy.model
    export_policy(model, None, folder)


def _publish(policy: nn.Module) -> dict[str, Tensor]:
    """What servers get, unpacked from the buckets in which it travels."""
    model: Any = policy.model
    sent = CheckpointNames(model).of(gather_weights(policy))
    return {n: t for bucket in make_buckets(sent, _BUCKET_BYTES) for n, t in unpack(bucket).items()}


@dataclass(frozen=True)
class Parts:
    """What is certified; the package's own by default, a test hands in others.

    Attributes:
        policy: A model of transformers to the policy that trains; takes `share_prefixes`.
        publish: A policy to the tensors that servers get, by name.
        engine: A folder to what serves it.
        export: Writes a policy to a folder.
    """

    policy: Callable[..., nn.Module] = PackedPolicy
    publish: Callable[[nn.Module], Mapping[str, Tensor]] = _publish
    engine: Callable[[str], ModelRunner] = _serve
    export: Callable[[nn.Module, Path], None] = _export


@torch.no_grad()
def stepped(model: nn.Module, size: float = 0.05) -> None:
    """Move every parameter, as a step of training does; always in the same way."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
