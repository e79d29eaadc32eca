"""The running requests as tensors: one row each, in the order of their slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grpo.engine.protocol import Generation
from lightning_grpo.engine.request import Request
from lightning_grpo.engine.sampling import SamplingPlan

_FIRST_CAPACITY = 64


class Rows:
    """What a decode step needs of every running request, without a Python loop over them.

    Args:
        max_rows: Most requests that run at once.
        vocab_size: Number of token ids.

    Attributes:
        requests: The request of each row.
        watched: Rows that need a look at every token (they stream or have stop strings).
        lengths: Tokens in the slot of each row, int64 `[max_rows]`.
        tokens: The newest token of each row, not yet in its slot, int64 `[max_rows]`.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.requests: list[Request] = []
        self.lengths = torch.zeros(max_rows, dtype=torch.int64)
        self.tokens = torch.zeros(max_rows, dtype=torch.int64)
        self._num_new = torch.zeros(max_rows, dtype=torch.int64)
        self._max_new = torch.zeros(max_rows, dtype=torch.int64)
        self._min_new = torch.zeros(max_rows, dtype=torch.int64)
        self._seeds = torch.zeros(max_rows, dtype=torch.int64)
        self._top_k = torch.zeros(max_rows, dtype=torch.int64)
        self._temperatures = torch.ones(max_rows)
        self._top_p = torch.ones(max_rows)
        self._min_p = torch.zeros(max_rows)
        self._greedy = torch.zeros(max_rows, dtype=torch.bool)
        self._stop_ids = torch.full((max_rows, 1), -1)
        self._output_ids = torch.zeros(max_rows, _FIRST_CAPACITY, dtype=torch.int64)
        self._output_logprobs = torch.zeros(max_rows, _FIRST_CAPACITY)
        self._plan: SamplingPlan | None = None
        self._any_min_new = False
        self.watched: list[int] = []

    def __len__(self) -> int:
        return len(self.requests)

    def append(self, requests: Sequence[Request]) -> None:
        """Add requests behind the running ones, with the output that they already have."""
        first = len(self)
        rows = slice(first, first + len(requests))
        wants = [r.generation for r in requests]
        columns: list[tuple[Tensor, list[int] | list[float] | list[bool]]] = [
            (self.lengths, [r.num_tokens for r in requests]),
            (self._num_new, [len(r.output_ids) for r in requests]),
            (self._max_new, [w.max_new_tokens for w in wants]),
            (self._min_new, [w.min_new_tokens for w in wants]),
            (self._seeds, [w.seed for w in wants]),
            (self._top_k, [w.top_k for w in wants]),
            (self._temperatures, [w.temperature for w in wants]),
            (self._top_p, [w.top_p for w in wants]),
            (self._min_p, [w.min_p for w in wants]),
            (self._greedy, [w.greedy for w in wants]),
        ]
        for tensor, values in columns:
            tensor[rows] = torch.tensor(values, dtype=tensor.dtype)
        self._append_stop_ids(first, wants)
        for row, request in enumerate(requests, first):
            if request.output_ids:
                self._widen(len(request.output_ids))
                self._output_ids[row, : len(request.output_ids)] = torch.tensor(request.output_ids)
                self._output_logprobs[row, : len(request.output_logprobs)] = torch.tensor(
                    request.output_logprobs
                )
        self.requests += requests
        self._changed()

    def plan(self, start: int, stop: int) -> SamplingPlan:
        """How to sample the next token of rows `start` to `stop`."""
        if (start, stop) != (0, len(self)):
            return self._make_plan(start, stop)
        if self._plan is None:
            self._plan = self._make_plan(start, stop)
        return self._plan

    def _make_plan(self, start: int, stop: int) -> SamplingPlan:
        rows = slice(start, stop)
        wants = [r.generation for r in self.requests[rows]]
        return SamplingPlan(
            temperatures=self._temperatures[rows],
            greedy=self._greedy[rows],
            top_p=self._top_p[rows],
            top_k=self._top_k[rows],
            min_p=self._min_p[rows],
            seeds=self._seeds[rows],
            positions=self.lengths[rows],
            any_scaled=any(w.temperature != 1 for w in wants),
            any_greedy=any(w.greedy for w in wants),
            all_greedy=all(w.greedy for w in wants),
            any_filtered=any(
                w.top_p < 1 or w.top_k < self._vocab_size or w.min_p > 0 for w in wants
            ),
        )

    def banned(self, start: int, stop: int) -> Tensor | None:
        """The end tokens of rows that are still too short to end, bool `[rows, vocab]`."""
        rows = slice(start, stop)
        if not self._any_min_new:
            return None
        early = self._num_new[rows] < self._min_new[rows]
        stop_ids = self._stop_ids[rows]
        banned = torch.zeros(stop - start, self._vocab_size + 1, dtype=torch.bool)
        columns = stop_ids.where(stop_ids >= 0, self._vocab_size)
        banned.scatter_(1, columns, early[:, None].expand_as(columns))
        # What is no id points at the column that is cut off here.
        return banned[:, : self._vocab_size]

    def record(self, start: int, stop: int, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Append a token to rows `start` to `stop`; returns which of them end, bool `[rows]`."""
        rows = slice(start, stop)
        num_new = self._num_new[rows]
        self._widen(int(num_new.max()) + 1)
        self._output_ids[rows].scatter_(1, num_new[:, None], tokens[:, None])
        self._output_logprobs[rows].scatter_(1, num_new[:, None], logprobs[:, None])
        num_new += 1
        self.tokens[rows] = tokens
        ended = (tokens[:, None] == self._stop_ids[rows]).any(1)
        return ended | (num_new >= self._max_new[rows]) | ~logprobs.isfinite()

    def advance(self) -> None:
        """Count the newest token of every row as lying in its slot."""
        self.lengths[: len(self)] += 1

    def output(self, row: int) -> tuple[list[int], list[float]]:
        """Token ids and logprobs that a row has sampled so far."""
        count = int(self._num_new[row])
        return self._output_ids[row, :count].tolist(), self._output_logprobs[row, :count].tolist()

    def tail(self, row: int, count: int) -> list[int]:
        """The last `count` sampled ids of a row."""
        end = int(self._num_new[row])
        return list(self._output_ids[row, max(0, end - count) : end].tolist())

    def remove(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Drop rows and close the gaps with the last rows.

        Returns:
            The rows that moved and where to, int64 `[moves]` each.
        """
        gone = set(rows)
        remaining = len(self) - len(gone)
        gaps = [row for row in sorted(gone) if row < remaining]
        movers = [row for row in range(remaining, len(self)) if row not in gone]
        source, target = torch.tensor(movers, dtype=torch.int64), torch.tensor(gaps).long()
        if movers:
            for tensor in self._tensors():
                tensor[target] = tensor[source]
        for mover, gap in zip(movers, gaps, strict=True):
            self.requests[gap] = self.requests[mover]
        del self.requests[remaining:]
        self._changed()
        return source, target

    def _changed(self) -> None:
        self._plan = None
        self._any_min_new = any(r.generation.min_new_tokens for r in self.requests)
        self.watched = [i for i, r in enumerate(self.requests) if r.stream or r.generation.stop]

    def _tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def _append_stop_ids(self, first: int, wants: Sequence[Generation]) -> None:
        most = max(len(w.stop_ids) for w in wants)
        missing = most - self._stop_ids.shape[1]
        if missing > 0:
            more = self._stop_ids.new_full((len(self._stop_ids), missing), -1)
            self._stop_ids = torch.cat([self._stop_ids, more], dim=1)
        width = self._stop_ids.shape[1]
        self._stop_ids[first : first + len(wants)] = torch.tensor(
            [w.stop_ids + (-1,) * (width - len(w.stop_ids)) for w in wants]
        )

    def _widen(self, count: int) -> None:
        capacity = self._output_ids.shape[1]
        if count <= capacity:
            return
        more = max(count, 2 * capacity) - capacity
        self._output_ids = torch.nn.functional.pad(self._output_ids, (0, more))
        self._output_logprobs = torch.nn.functional.pad(self._output_logprobs, (0, more))
