"""Optimizers that ask for loss and gradient several times in a step, as users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Repeating(torch.optim.SGD):
    """Evaluates three times, the second time at weights that were moved away and back.

    Attributes:
        seen: Norm of the gradient at each evaluation.
    """

    def __init__(self, params: Any, lr: float = 0.1, move: float = 0.5) -> None:
        super().__init__(params, lr=lr)
        self.move = move
        self.seen: list[list[float]] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        loss, norms = closure(), [total_norm(parameters)]
        for moved in (self.move, 0.0):
            before = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(moved * p)
            closure()
            norms.append(total_norm(parameters))
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        self.seen.append(norms)
        super().step()
        return loss


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412) with SGD."""

    def __init__(self, params: Any, lr: float = 1e-2, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        loss = closure()
        trained = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in trained])
        for group, p in trained:
            self.state[p]["moved"] = p.grad * (group["rho"] / (norm + 1e-12))
            p.add_(self.state[p]["moved"])
        closure()
        for group, p in trained:
            p.sub_(self.state[p]["moved"]).add_(p.grad, alpha=-group["lr"])
        return loss


def total_norm(parameters: list[Tensor]) -> float:
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
