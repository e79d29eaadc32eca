"""Rows and slots of a batch, and where a text stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.model import ModelRunner, PromptState, SlotCache
from lightning_grpo.engine.requests import Request
from lightning_grpo.engine.sampling import Noise, SamplingPlan, sample


def stop_window(stop: Sequence[str]) -> int:
    """How many of the last tokens a new match of a stop string can lie in.

    A token holds a byte or more; the few beyond the longest string's bytes let a character that
    starts before it decode whole.
    """
    return max(len(s.encode()) for s in stop) + 4


def find_stop(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], token_ids: Sequence[int]
) -> str | None:
    """The first of `stop` that the tokens spell, special tokens included; None if none."""
    text = decode_text(tokenizer, token_ids, skip_special_tokens=False)
    return next((s for s in stop if s in text), None)


def decode_text(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool = True,
) -> str:
    """The text of token ids."""
    text = tokenizer.decode(
        list(token_ids),
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )
    if not isinstance(text, str):
        raise TypeError(f"the tokenizer decoded to {type(text).__name__}")
    return text


def trim(text: str, matched: str | int | None) -> str:
    """Cut a text at the string that stopped it."""
    if isinstance(matched, str):
        return text.partition(matched)[0]
    return text


_FIRST_CAPACITY = 64
_PLANNED: dict[str, tuple[torch.dtype, Callable[[Request], float]]] = {
    "temperatures": (torch.float32, lambda r: r.generation.temperature),
    "greedy": (torch.bool, lambda r: r.generation.greedy),
    "top_p": (torch.float32, lambda r: r.generation.top_p),
    "top_k": (torch.int64, lambda r: r.generation.top_k),
    "min_p": (torch.float32, lambda r: r.generation.min_p),
    "seeds": (torch.int64, lambda r: r.generation.seed),
    "positions": (torch.int64, lambda r: r.num_tokens),
}
"""The tensors of a `SamplingPlan`, and what each request puts into them."""
_COUNTED: dict[str, tuple[torch.dtype, Callable[[Request], float]]] = {
    "num_new": (torch.int64, lambda r: len(r.output_ids)),
    "max_new": (torch.int64, lambda r: r.generation.max_new_tokens),
    "min_new": (torch.int64, lambda r: r.generation.min_new_tokens),
}


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
        self.watched: list[int] = []
        self.tokens = torch.zeros(max_rows, dtype=torch.int64)
        self._columns = {
            name: torch.zeros(max_rows, dtype=dtype)
            for name, (dtype, _) in (_PLANNED | _COUNTED).items()
        }
        self.lengths = self._columns["positions"]
        self._num_new = self._columns["num_new"]
        self._stop_ids = torch.full((max_rows, 1), -1)
        self._output_ids = torch.zeros(max_rows, _FIRST_CAPACITY, dtype=torch.int64)
        self._output_logprobs = torch.zeros(max_rows, _FIRST_CAPACITY)
        self._plan: SamplingPlan | None = None
        self._any_min_new = False

    def __len__(self) -> int:
        return len(self.requests)

    def append(self, requests: Sequence[Request]) -> None:
        """Add requests behind the running ones, with the output that they already have."""
        first = len(self)
        rows = slice(first, first + len(requests))
        for name, (dtype, value) in (_PLANNED | _COUNTED).items():
            self._columns[name][rows] = torch.tensor([value(r) for r in requests], dtype=dtype)
        most = max(len(r.generation.stop_ids) for r in requests)
        missing = max(0, most - self._stop_ids.shape[1])
        self._stop_ids = functional.pad(self._stop_ids, (0, missing), value=-1)
        self._stop_ids[rows] = -1
        for row, request in enumerate(requests, first):
            stop_ids, output = request.generation.stop_ids, request.output_ids
            self._stop_ids[row, : len(stop_ids)] = torch.tensor(stop_ids, dtype=torch.int64)
            if output:
                self._widen(len(output))
                self._output_ids[row, : len(output)] = torch.tensor(output)
                self._output_logprobs[row, : len(output)] = torch.tensor(request.output_logprobs)
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
            **{name: self._columns[name][rows] for name in _PLANNED},
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
        early = self._num_new[rows] < self._columns["min_new"][rows]
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
        return ended | (num_new >= self._columns["max_new"][rows]) | ~logprobs.isfinite()

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
            for tensor in (
                *(self.tokens, self._stop_ids, self._output_ids, self._output_logprobs),
                *self._columns.values(),
            ):
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

    def _widen(self, count: int) -> None:
        capacity = self._output_ids.shape[1]
        if count <= capacity:
            return
        more = max(count, 2 * capacity) - capacity
        self._output_ids = functional.pad(self._output_ids, (0, more))
        self._output_logprobs = functional.pad(self._output_logprobs, (0, more))


Reason = dict[str, Any]
"""SGLang's `finish_reason`."""

ABORTED: Reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
NOT_FINITE: Reason = ABORTED | {
    "message": "the model's logits are not finite",
    "status_code": 500,
    "err_type": "InternalServerError",
}


Tell = Callable[[Request, list[int], list[float], Reason | None], None]
"""Takes what a request has sampled: ids, their logprobs, and why it ended (None: it runs)."""


class RunningBatch:
    """Decodes all slots together; requests come and go between two steps.

    Args:
        runner: The model.
        tokenizer: Spells what was sampled; None: no request has stop strings.
        max_running: Most requests at once.
        tell: Called with each output: of rows that stream, and of those that end.
        fresh_when_empty: Whether memory is given back when the last request ends, so that the next
            one finds the same shapes as the first.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | None,
        max_running: int,
        tell: Tell,
        fresh_when_empty: bool = False,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._tell = tell
        self._fresh_when_empty = fresh_when_empty
        self._noise = Noise(runner.vocab_size)
        self._slots = SlotCache(max_running, runner.context_length)
        self._rows = Rows(max_running, runner.vocab_size)
        self.tokens_sampled = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def requests(self) -> list[Request]:
        """Who runs, by slot."""
        return self._rows.requests

    def free_memory(self) -> None:
        """Give the slots' memory back; only while nothing runs."""
        self._slots.clear()

    def num_sampled(self, row: int) -> int:
        """How many tokens the request in a slot has sampled."""
        return len(self._rows.output(row)[0])

    def step(self) -> None:
        """Sample one more token for every request."""
        running = len(self._rows)
        if not running:
            return
        logits = self._runner.decode(
            self._slots, self._rows.tokens[:running], self._rows.lengths[:running]
        )
        self._rows.lengths[:running] += 1  # the newest token of every row is in its slot
        self._sample(0, logits)

    def add(self, placed: Sequence[tuple[Request, PromptState]]) -> None:
        """Give requests slots and sample the next token of each.

        Args:
            placed: With the states of their prompts; what retracted ones had sampled is read here.
        """
        first = len(self._rows)
        placed = sorted(placed, key=lambda item: len(item[0].output_ids))
        longest = max(request.num_tokens for request, _ in placed)
        self._slots.reserve(first + len(placed), longest + 1, placed[0][1].kv)
        start = 0
        for index in range(1, len(placed) + 1):
            # Neighbors that share a prompt are filled by one copy.
            if index == len(placed) or placed[index][1] is not placed[start][1]:
                self._slots.place(first + start, index - start, placed[start][1].kv)
                start = index
        requests = [request for request, _ in placed]
        self._rows.append(requests)
        logits = torch.stack([state.logits for _, state in placed])
        fresh = sum(not request.output_ids for request in requests)
        if fresh < len(requests):
            tails = [request.output_ids for request in requests[fresh:]]
            lengths = torch.tensor([state.num_tokens for _, state in placed[fresh:]])
            logits[fresh:] = self._runner.extend(self._slots, tails, lengths, first + fresh)
        self._sample(first, logits)

    def end(self, requests: Sequence[Request], reason: Reason) -> None:
        """End requests that run, with what they have."""
        chosen = set(requests)
        rows = [row for row, request in enumerate(self.requests) if request in chosen]
        self._finish(dict.fromkeys(rows, reason))

    def take_back(self) -> list[Request]:
        """Empty all slots; the requests know their output and can be added again."""
        requests = list(self.requests)
        for row, request in enumerate(requests):
            request.output_ids, request.output_logprobs = self._rows.output(row)
            request.num_retractions += 1
        if requests:
            self._drop(list(range(len(requests))))
        return requests

    def _sample(self, first: int, logits: Tensor) -> None:
        rows = self._rows
        end = first + len(logits)
        tokens, logprobs = sample(
            logits, rows.plan(first, end), self._noise, rows.banned(first, end)
        )
        ended = rows.record(first, end, tokens, logprobs)
        self.tokens_sampled += len(logits)
        reasons: dict[int, Reason] = {}
        if bool(ended.any()):
            for row in (ended.nonzero()[:, 0] + first).tolist():
                reasons[row] = self._reason(row)
        for row in rows.watched:
            if row < first or row in reasons:
                continue
            matched = self._match(row)
            if matched is not None:
                reasons[row] = matched
            elif rows.requests[row].stream:
                self._tell(rows.requests[row], *rows.output(row), None)
        self._finish(reasons)

    def _match(self, row: int) -> Reason | None:
        stop = self.requests[row].generation.stop
        if not stop or self._tokenizer is None:
            return None
        matched = find_stop(self._tokenizer, stop, self._rows.tail(row, stop_window(stop)))
        return None if matched is None else {"type": "stop", "matched": matched}

    def _reason(self, row: int) -> Reason:
        ids, logprobs = self._rows.output(row)
        if not math.isfinite(logprobs[-1]):
            return NOT_FINITE
        # As SGLang: at the length limit the reason is the length, also for an end token.
        if len(ids) >= self.requests[row].generation.max_new_tokens:
            return {"type": "length", "length": len(ids)}
        return {"type": "stop", "matched": ids[-1]}

    def _finish(self, reasons: dict[int, Reason]) -> None:
        """End rows with their reasons and close the gaps."""
        if not reasons:
            return
        for row, reason in reasons.items():
            ids, logprobs = self._rows.output(row)
            if reason is NOT_FINITE:
                self._slots.wipe(torch.tensor([row]))
                ids, logprobs = ids[:-1], logprobs[:-1]
            self._tell(self.requests[row], ids, logprobs, reason)
        self._drop(list(reasons))

    def _drop(self, rows: list[int]) -> None:
        longest = int(self._rows.lengths[: len(self._rows)].max())
        source, target = self._rows.remove(rows)
        if len(source):
            self._slots.move(source, target, longest)
        if not len(self._rows) and self._fresh_when_empty:
            self._slots.clear()
