"""Rows longer than one GPU has room for: the ranks of a group compute each packed row together.

Sequence parallelism by an exchange of heads (DeepSpeed-Ulysses, arXiv 2309.14509): each rank
computes a slice of the row's tokens, from the embedding to the head. Only attention looks at other
tokens: there each rank has all of the row's, of its own heads. One all-to-all before it and one
behind it bring the numbers from one form to the other.

What is computed of a token is what one rank computes: nothing is approximated, and windows, caps,
sinks, shared prompts and positions that depend on the row's length keep their meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from lightning_grpo.algorithm.layers import ScoreForm


@dataclass(frozen=True)
class RowShare:
    """One rank's share of a packed row.

    Attributes:
        group: The ranks of the row, in the order of their slices.
        num_tokens: Of the whole row, those that are computed.
    """

    group: ProcessGroup
    num_tokens: int

    @property
    def length(self) -> int:
        """Tokens of a slice; the last ones are filled up, so that all are of one length."""
        return -(-self.num_tokens // self.group.size())

    @property
    def start(self) -> int:
        """Where this rank's slice begins."""
        return self.length * self.group.rank()

    @property
    def num_own(self) -> int:
        """Tokens of this rank's slice that are the row's."""
        return min(max(self.num_tokens - self.start, 0), self.length)

    def own(self, values: Tensor, filling: int = 0) -> Tensor:
        """This rank's slice of values of the row, `[tokens, ...]` to `[length, ...]`."""
        values = values[self.start : self.start + self.num_own]
        shape = (self.length - self.num_own, *values.shape[1:])
        missing = torch.full(shape, filling, device=values.device).to(values.dtype)
        return torch.cat([values, missing]) if len(missing) else values

    def holds(self, tokens: Tensor) -> Tensor:
        """Whether tokens, by their positions in the row, are this rank's, bool."""
        return (tokens >= self.start) & (tokens < self.start + self.length)

    def whole(self, values: Tensor) -> Tensor:
        """Values of all of the row, `[...]`, each of which one rank has and the others leave 0.

        Every rank computes the same loss of them, so that the gradient of a rank's part is the
        loss's own: added up over the ranks it counts once.
        """
        return cast("Tensor", _Sum.apply(values, self.group))

    def by_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """From this rank's tokens with all heads to all tokens with this rank's heads.

        Where ranks are not divided evenly among key heads each of these is sent as often as it
        takes for every rank to have those that its queries look at.

        Args:
            query: `[1, heads, length, head_dim]`.
            key: `[1, key heads, length, head_dim]`.
            value: `[1, key heads, length, value_dim]`.

        Returns:
            The same, `[1, heads of this rank, tokens, ...]`.
        """
        ranks = self.group.size()
        copies = math.lcm(key.shape[1], ranks) // key.shape[1]
        if copies > 1:
            key, value = (t.repeat_interleave(copies, 1) for t in (key, value))
        given = (query, key, value)
        # [ranks, length, numbers of that rank's heads], all three in one exchange.
        parts = [t[0].unflatten(0, (ranks, -1)).transpose(1, 2).flatten(2) for t in given]
        rows = self._exchanged(torch.cat(parts, 2)).flatten(0, 1)[: self.num_tokens]
        found = rows.split([part.shape[2] for part in parts], 1)
        return tuple(
            own.unflatten(1, (-1, t.shape[3])).transpose(0, 1).unsqueeze(0)
            for own, t in zip(found, given, strict=True)
        )

    def by_tokens(self, out: Tensor) -> Tensor:
        """The way back: `[1, tokens, heads of this rank, dim]` to `[1, length, heads, dim]`."""
        ranks, heads = self.group.size(), out.shape[2:]
        rows = pad(out[0].flatten(1), (0, 0, 0, ranks * self.length - self.num_tokens))
        parts = self._exchanged(rows.unflatten(0, (ranks, -1)))
        return parts.unflatten(2, heads).transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def form(self, form: ScoreForm | None) -> ScoreForm | None:
        """What is done to the scores of this rank's heads."""
        if form is None or form.sinks is None:
            return form
        sinks = form.sinks.reshape(self.group.size(), -1)[self.group.rank()]
        return replace(form, sinks=sinks)

    def _exchanged(self, parts: Tensor) -> Tensor:
        return cast("Tensor", _Exchange.apply(parts, self.group))


class _Exchange(torch.autograd.Function):
    """Part i of `[ranks, ...]` goes to rank i, and rank i's comes into its place.

    Gradients go back the way that values came, which is the same exchange.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(parts: Tensor, group: ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    distributed.all_to_all_single(received, parts, group=group)
    return received


class _Sum(torch.autograd.Function):
    """The sum over ranks, of which each takes the same gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values, group=group)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
