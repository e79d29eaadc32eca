"""Rows and slots of a batch, and where a text stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
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
Reason = dict[str, Any]
"""SGLang's `finish_reason`."""

ABORTED: Reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
NOT_FINITE: Reason = ABORTED | {
    "message": "the model's logits are not finite",
    "status_code": 500,
    "err_type": "InternalServerError",
}


class Rows:
    """The running requests, one in each slot, and what a decode step needs of them as tensors.

    Args:
        max_rows: Most requests that run at once.
        vocab_size: Number of token ids.

    Attributes:
        requests: The request of each row.
        lengths: Tokens in the slot of each row, int64 `[max_rows]`.
        tokens: The newest token of each row, not yet in its slot, int64 `[max_rows]`.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.requests: list[Request] = []
        self.tokens = torch.zeros(max_rows, dtype=torch.int64)
        self._columns = {
            name: torch.zeros(max_rows, dtype=dtype) for name, (dtype, _) in _PLANNED.items()
        }
        self.lengths = self._columns["positions"]
        self._plan: SamplingPlan | None = None
        self._any_min_new = False

    def __len__(self) -> int:
        return len(self.requests)

    def append(self, requests: Sequence[Request]) -> None:
        """Add requests behind the running ones."""
        rows = slice(len(self), len(self) + len(requests))
        for name, (dtype, value) in _PLANNED.items():
            self._columns[name][rows] = torch.tensor([value(r) for r in requests], dtype=dtype)
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
        if not self._any_min_new:
            return None
        banned = torch.zeros(stop - start, self._vocab_size, dtype=torch.bool)
        for row, request in enumerate(self.requests[start:stop]):
            if len(request.output_ids) < request.generation.min_new_tokens:
                banned[row, list(request.generation.stop_ids)] = True
        return banned

    def record(self, first: int, tokens: Tensor, logprobs: Tensor) -> dict[int, Reason]:
        """Append a token to each row from `first` on; returns which of them end, and why."""
        self.tokens[first : first + len(tokens)] = tokens
        reasons: dict[int, Reason] = {}
        sampled = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        for row, (token, logprob) in enumerate(sampled, first):
            request = self.requests[row]
            request.output_ids.append(token)
            request.output_logprobs.append(logprob)
            if not math.isfinite(logprob):
                reasons[row] = NOT_FINITE
            # As SGLang: at the length limit the reason is the length, also for an end token.
            elif len(request.output_ids) >= request.generation.max_new_tokens:
                reasons[row] = {"type": "length", "length": len(request.output_ids)}
            elif token in request.generation.stop_ids:
                reasons[row] = {"type": "stop", "matched": token}
        return reasons

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
            for tensor in (self.tokens, *self._columns.values()):
                tensor[target] = tensor[source]
        for mover, gap in zip(movers, gaps, strict=True):
            self.requests[gap] = self.requests[mover]
        del self.requests[remaining:]
        self._changed()
        return source, target

    def _changed(self) -> None:
        self._plan = None
        self._any_min_new = any(r.generation.min_new_tokens for r in self.requests)


Tell = Callable[[Request, Reason | None], None]
"""Takes a request with something new to say, and why it ended (None: it runs)."""


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
        for request in requests:
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
        reasons = rows.record(first, tokens, logprobs)
        self.tokens_sampled += len(logits)
        for row, request in enumerate(rows.requests[first:end], first):
            if row in reasons or not (request.stream or request.generation.stop):
                continue
            matched = self._match(request)
            if matched is not None:
                reasons[row] = {"type": "stop", "matched": matched}
            elif request.stream:
                self._tell(request, None)
        self._finish(reasons)

    def _match(self, request: Request) -> str | None:
        stop = request.generation.stop
        if not stop or self._tokenizer is None:
            return None
        return find_stop(self._tokenizer, stop, request.output_ids[-stop_window(stop) :])

    def _finish(self, reasons: dict[int, Reason]) -> None:
        """End rows with their reasons and close the gaps."""
        if not reasons:
            return
        for row, reason in reasons.items():
            request = self.requests[row]
            if reason is NOT_FINITE:
                self._slots.wipe(torch.tensor([row]))
                del request.output_ids[-1], request.output_logprobs[-1]
            self._tell(request, reason)
        self._drop(list(reasons))

    def _drop(self, rows: list[int]) -> None:
        longest = int(self._rows.lengths[: len(self._rows)].max())
        source, target = self._rows.remove(rows)
        if len(source):
            self._slots.move(source, target, longest)
        if not len(self._rows) and self._fresh_when_empty:
            self._slots.clear()
