"""Tiny mixtures of experts, and their routers' formulas written down once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grpo.algorithm.layers import _replayed, _TopK
from lightning_grpo.policy.packed import PackedPolicy
from tests.fakes.causal_models import make_model_of

NUM_EXPERTS = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "deepseek_v2": {"n_routed_experts": 8, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "gpt_oss": {"num_local_experts": 8},
    "qwen3_next": {
        "num_experts": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}


def make_mixture(kind: str, seed: int = 0, **settings: Any) -> Any:
    """Three layers, eight experts each, two for each token; every weight has a value."""
    model = make_model_of(kind, seed, **{"num_hidden_layers": 3, **SETTINGS[kind], **settings})
    if next(model.parameters()).device.type != "meta":
        generator = torch.Generator().manual_seed(seed)
        for router in routers(model):
            for values in (*router.parameters(), *router.buffers()):
                values.data.normal_(generator=generator)
    return model


def routers(model: nn.Module) -> list[Any]:
    """In the order of the layers."""
    return [m for m in model.modules() if type(m).__name__.endswith(("Router", "Gate"))]


@contextmanager
def replaying(experts: Tensor) -> Iterator[None]:
    """Within it a router chooses these, `[tokens, top_k]`."""
    counts = torch.zeros(2, dtype=torch.int64)
    with _TopK(partial(_replayed, experts, counts, NUM_EXPERTS)):
        yield


def own_routes(model: Any, ids: Tensor, bounds: Tensor, num_layers: int = 3) -> Tensor:
    """What a model's routers choose, `[tokens, layers, top_k]`; all bits set without a router."""
    chosen: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda _, __, o: chosen.append(o[2])) for r in routers(model)]
    with torch.no_grad():
        PackedPolicy(model, share_prefixes=False)(ids, bounds)
    for hook in hooks:
        hook.remove()
    dense = [torch.full_like(chosen[0], -1)] * (num_layers - len(chosen))
    return torch.stack([*dense, *chosen], 1)


def _softmax(router: Any, hidden: Tensor, experts: Tensor, *, normalized: bool) -> Tensor:
    weights = (hidden @ router.weight.t()).softmax(-1).gather(1, experts)
    return weights / weights.sum(1, keepdim=True) if normalized else weights


def _of_logits(router: Any, hidden: Tensor, experts: Tensor) -> Tensor:
    logits = hidden @ router.weight.t() + router.bias
    return logits.gather(1, experts).softmax(-1)


def _sigmoid(router: Any, hidden: Tensor, experts: Tensor) -> Tensor:
    weights = (hidden @ router.weight.t()).sigmoid().gather(1, experts)
    return router.routed_scaling_factor * weights / (weights.sum(1, keepdim=True) + 1e-20)


def _scaled(router: Any, hidden: Tensor, experts: Tensor) -> Tensor:
    return router.routed_scaling_factor * _softmax(router, hidden, experts, normalized=False)


FORMULAS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "qwen3_moe": partial(_softmax, normalized=True),
    "qwen2_moe": partial(_softmax, normalized=False),
    "mixtral": partial(_softmax, normalized=True),
    "olmoe": partial(_softmax, normalized=False),
    "deepseek_v2": _scaled,
    "deepseek_v3": _sigmoid,
    "gpt_oss": _of_logits,
    "qwen3_next": partial(_softmax, normalized=True),
}
MIXTURES = tuple(FORMULAS)
