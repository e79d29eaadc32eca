"""Checks of the policy that trains: its logprobs, packed, and their gradient."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_grpo.certify.parts import (
    APART_LIMIT,
    GRADIENT_LIMIT,
    LOGPROB_LIMIT,
    CheckLine,
    Parts,
    Verdict,
    difference,
    measured,
)
from lightning_grpo.certify.rows import (
    pack,
    plain_logprobs,
    policy_logprobs,
    rows_of,
    rows_with_prompts,
)
from lightning_grpo.certify.tiny import tiny_model

_SMALL = 1e-3
"""Of the whole gradient: a parameter with less of it (none, by symmetry) is held against that."""
_MICRO_BATCHES = 3


def packed(config: Any, parts: Parts) -> CheckLine:
    """Rows packed together, against each row alone by transformers' own forward."""
    rows = rows_of(config)
    with torch.no_grad():
        expected = plain_logprobs(tiny_model(config), rows)
    found = policy_logprobs(parts.policy(tiny_model(config)), rows)
    lengths = ", ".join(str(len(row)) for row in rows)
    return measured(
        "packed", difference(found, expected), LOGPROB_LIMIT,
        f"logprobs of rows of {lengths} tokens, packed, against each alone in transformers",
    )  # fmt: skip


def apart(config: Any, parts: Parts) -> CheckLine:
    """Rows whose neighbors in the pack have other tokens: nothing of one reaches another."""
    rows, others = rows_of(config), rows_of(config, 1)
    policy, figure = parts.policy(tiny_model(config)), 0.0
    for kept in (slice(0, None, 2), slice(1, None, 2)):
        beside = list(others)
        beside[kept] = rows[kept]
        lengths = [len(row) for row in rows]
        pair = (policy_logprobs(policy, each).split(lengths)[kept] for each in (rows, beside))
        figure = max(figure, difference(*map(torch.cat, pair)))
    return measured(
        "apart", figure, APART_LIMIT,
        "logprobs of rows, packed beside other ones of the same lengths",
    )  # fmt: skip


def prefixes(config: Any, parts: Parts) -> CheckLine:
    """Rows that share prompts: each prompt computed once, against once for each row."""
    rows = rows_with_prompts()
    shared, alone = (
        policy_logprobs(parts.policy(tiny_model(config), share_prefixes=share), rows)
        for share in (True, False)
    )
    return measured(
        "prefixes", difference(shared, alone), LOGPROB_LIMIT,
        "logprobs where prompts are computed once, against once for each row",
    )  # fmt: skip


def passes(config: Any, parts: Parts) -> CheckLine:
    """Two passes over the same tokens, in training mode."""
    policy, rows = parts.policy(tiny_model(config)).train(), rows_of(config)
    first, second = (policy_logprobs(policy, rows) for _ in range(2))
    return measured("passes", difference(first, second), 0.0, "two passes, alike bit for bit")


def gradient(config: Any, parts: Parts) -> CheckLine:
    """Of a weighted sum of logprobs, against autograd through transformers' own forward."""
    rows = rows_with_prompts(1) + rows_of(config, 1)
    plain, model = (tiny_model(config, dtype=torch.float64) for _ in range(2))
    with _AllInFp64():
        _backward(plain_logprobs(plain, rows))
        _backward(parts.policy(model)(*pack(rows))[0])
    figure, worst = _gradient_difference(model, plain)
    return measured(
        "gradient", figure, GRADIENT_LIMIT,
        f"gradient in fp64, relative, against transformers' own; most in {worst}",
    )  # fmt: skip


def cuts(config: Any, parts: Parts) -> CheckLine:
    """The gradient of all rows at once, against that of several micro-batches."""
    rows = rows_of(config, 2)
    weights = _weights(sum(map(len, rows))).split([len(row) for row in rows])
    whole, parted = (tiny_model(config, dtype=torch.float64) for _ in range(2))
    policy = parts.policy(parted)
    with _AllInFp64():
        _backward(parts.policy(whole)(*pack(rows))[0], torch.cat(weights))
        for start in range(_MICRO_BATCHES):
            part = slice(start, None, _MICRO_BATCHES)
            _backward(policy(*pack(rows[part]))[0], torch.cat(weights[part]))
    figure, worst = _gradient_difference(parted, whole)
    return measured(
        "cuts", figure, GRADIENT_LIMIT,
        f"gradient in {_MICRO_BATCHES} micro-batches, relative, against one; most in {worst}",
    )  # fmt: skip


def checkpoint(config: Any, parts: Parts) -> CheckLine:
    """Two steps, against two with a checkpoint between them."""
    rows, written = rows_of(config, 3), io.BytesIO()
    straight, first, second = (parts.policy(tiny_model(config, seed)) for seed in (0, 0, 1))
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (straight, first, second)]
    for policy, optimizer in zip((straight, straight, first), (0, 0, 1), strict=True):
        _step(policy, optimizers[optimizer], rows)
    torch.save([first.state_dict(), optimizers[1].state_dict()], written)
    written.seek(0)
    weights, moments = torch.load(written, weights_only=True)
    second.load_state_dict(weights)
    optimizers[2].load_state_dict(moments)
    _step(second, optimizers[2], rows)
    return measured(
        "checkpoint", difference(*(policy_logprobs(p, rows) for p in (straight, second))), 0.0,
        "logprobs after two steps, and with a checkpoint between them, alike bit for bit",
    )  # fmt: skip


def _step(policy: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[Tensor]) -> None:
    optimizer.zero_grad()
    _backward(policy(*pack(rows))[0])
    optimizer.step()


def flops(config: Any, parts: Parts) -> CheckLine:
    """Whether a step's operations can be counted, as they are for its metrics."""
    lengths = [len(row) for row in rows_of(config)]
    policy: Any = parts.policy(tiny_model(config))
    count = policy.flops(lengths, sum(lengths) - len(lengths))
    verdict: Verdict = "ok" if 0 < count < math.inf else "WRONG"
    return CheckLine("flops", verdict, f"{count:,.0f} operations of these rows, for metrics")


class _AllInFp64(TorchFunctionMode):
    """Has fp64 stay fp64 where a model's own code asks for fp32: norms, softmax, shares of sinks.

    What two such roundings differ by grows from layer to layer beyond what a gradient may be off.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float and not args[0].is_floating_point():
            return args[
                0
            ].double()  # positions, which older versions multiply with fp64 as a matrix
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if each is torch.float32 else each for each in args]
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _weights(count: int) -> Tensor:
    """Each token's own, as advantages are."""
    return 1.0 + torch.arange(count, dtype=torch.float64).sin() / 2


def _backward(logprobs: Tensor, weights: Tensor | None = None) -> None:
    weights = _weights(len(logprobs)) if weights is None else weights
    torch.autograd.backward([(logprobs * weights).sum()])


def _gradient_difference(left: nn.Module, right: nn.Module) -> tuple[float, str]:
    """The largest over parameters, relative to its own gradient, and whose it is."""
    mine, theirs = _gradients(left), _gradients(right)
    total = sum(g.square().sum().item() for g in theirs.values()) ** 0.5
    found = {
        name: ((mine[name] - g).norm() / max(g.norm().item(), _SMALL * total)).item()
        for name, g in theirs.items()
    }
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    return found[worst], worst


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
