"""From hidden states to logprobs and entropies, without ever holding all logits at once.

Rows are taken in chunks; the backward pass computes each chunk's logits again. Where all rows fit
into one chunk the log-probabilities are kept, and nothing is computed twice. Logits are fp32 (or
wider) also when hidden states and weights are bf16, or are made so by autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_CHUNK_LOGITS = 2**26
"""Logits of one chunk: 256 MiB in fp32."""


def largest_chunk(device: torch.device) -> int:
    """Logits of one chunk: on GPUs each chunk's share of the head's gradient costs memory traffic.

    On one H200 with a vocabulary of 152k, 2^28 instead of 2^26 took 7 % off a whole step.
    """
    return MAX_CHUNK_LOGITS if device.type == "cpu" else 4 * MAX_CHUNK_LOGITS


def chunk_rows(vocab_size: int, max_logits: int = MAX_CHUNK_LOGITS) -> int:
    """How many rows are computed at once."""
    return max(1, max_logits // vocab_size)


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    max_logits: int = MAX_CHUNK_LOGITS,
) -> tuple[Tensor, Tensor | None]:
    """Logprobs of `targets` under softmax(hidden weight^T / temperature), and its entropy.

    Args:
        hidden: `[rows, hidden]`.
        weight: Of the language-model head, `[vocab, hidden]`.
        targets: int64 `[rows]`.
        temperature: fp32 `[rows]`.
        with_entropy: Whether to compute the entropy too (with gradient).
        max_logits: Largest number of logits held at once.

    Returns:
        fp32 `[rows]`, and the same or None.
    """
    rows, device = chunk_rows(weight.shape[0], max_logits), hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with _without_autocast(device):
        logprobs, entropy = _Head.apply(hidden, weight, targets, temperature, with_entropy, rows)
    return logprobs, entropy if with_entropy else None


def _without_autocast(device: str) -> torch.autocast:
    """It would round every product to bf16, logits too."""
    return torch.autocast(device, enabled=False)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype == torch.bfloat16:
        # Products of bf16 are exact in fp32, so this is the fp32 head at the speed of bf16.
        logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
    else:
        logits = hidden.to(dtype) @ weight.to(dtype).t()
    return torch.log_softmax(logits.div_(temperature.unsqueeze(1)), dim=-1)


def _entropy(log_softmax: Tensor) -> Tensor:
    return -(log_softmax.exp() * log_softmax).sum(-1)


def _grad_logits(
    log_softmax: Tensor,
    targets: Tensor,
    temperature: Tensor,
    grad_logprobs: Tensor,
    entropy_and_grad: tuple[Tensor, Tensor] | None,
) -> Tensor:
    probabilities = log_softmax.exp()
    scale = grad_logprobs.unsqueeze(1)
    if entropy_and_grad is None:
        grad = probabilities.mul_(-scale)
    else:
        # dH / dz_j = -p_j (log p_j + H)
        entropy, grad_entropy = (t.unsqueeze(1) for t in entropy_and_grad)
        grad = probabilities.mul_(-scale - grad_entropy * (log_softmax + entropy))
    grad.scatter_add_(1, targets.unsqueeze(1), scale)
    return grad.div_(temperature.unsqueeze(1))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        with_entropy: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        temperature = temperature.to(dtype)
        log_softmax = None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            log_softmax = _log_softmax(hidden[part], weight, temperature[part])
            logprobs[part] = log_softmax.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            if with_entropy:
                entropy[part] = _entropy(log_softmax)
        ctx.rows, ctx.with_entropy = rows, with_entropy
        kept = log_softmax if len(hidden) <= rows else None
        ctx.save_for_backward(hidden, weight, targets, temperature, entropy, kept)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, temperature, entropy, kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=temperature.dtype) if need_weight else None
        with _without_autocast(hidden.device.type):
            for start in range(0, len(hidden), ctx.rows):
                part = slice(start, start + ctx.rows)
                log_softmax = kept
                if log_softmax is None:
                    log_softmax = _log_softmax(hidden[part], weight, temperature[part])
                grad = _grad_logits(
                    log_softmax,
                    targets[part],
                    temperature[part],
                    grad_logprobs[part],
                    (entropy[part], grad_entropy[part]) if ctx.with_entropy else None,
                ).to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad @ weight).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.t() @ hidden[part].to(grad.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None
