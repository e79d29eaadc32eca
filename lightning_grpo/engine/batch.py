"""The requests in slots: one token for each of them per step, and what that ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.engine.kv import PromptState, SlotCache
from lightning_grpo.engine.model import ModelRunner
from lightning_grpo.engine.request import Request
from lightning_grpo.engine.rows import Rows
from lightning_grpo.engine.sampling import Noise, sample
from lightning_grpo.engine.stopping import StopStrings

Reason = dict[str, Any]
"""SGLang's `finish_reason`."""

ABORTED: Reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
NOT_FINITE: Reason = ABORTED | {
    "message": "the model's logits are not finite",
    "status_code": 500,
    "err_type": "InternalServerError",
}


@dataclass(frozen=True)
class News:
    """What a request has sampled so far, and why it ended if it did.

    Attributes:
        request: Which one.
        token_ids: Sampled ids.
        logprobs: Their logprobs.
        reason: None while it runs.
    """

    request: Request
    token_ids: list[int]
    logprobs: list[float]
    reason: Reason | None


class RunningBatch:
    """Decodes all slots together; requests come and go between two steps.

    Args:
        runner: The model.
        stop_strings: Looks for stop strings.
        max_running: Most requests at once.
        fresh_when_empty: Whether memory is given back when the last request ends, so that the next
            one finds the same shapes as the first.
    """

    def __init__(
        self,
        runner: ModelRunner,
        stop_strings: StopStrings,
        max_running: int,
        fresh_when_empty: bool = False,
    ) -> None:
        self._runner = runner
        self._stop_strings = stop_strings
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

    def step(self) -> list[News]:
        """Sample one more token for every request."""
        running = len(self._rows)
        if not running:
            return []
        logits = self._runner.decode(
            self._slots, self._rows.tokens[:running], self._rows.lengths[:running]
        )
        self._rows.advance()
        return self._sample(0, logits)

    def add(self, placed: Sequence[tuple[Request, PromptState]]) -> list[News]:
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
        return self._sample(first, logits)

    def end(self, requests: Sequence[Request], reason: Reason) -> list[News]:
        """End requests that run, with what they have."""
        chosen = set(requests)
        rows = [row for row, request in enumerate(self.requests) if request in chosen]
        return self._finish(dict.fromkeys(rows, reason))

    def take_back(self) -> list[Request]:
        """Empty all slots; the requests know their output and can be added again."""
        requests = list(self.requests)
        for row, request in enumerate(requests):
            request.output_ids, request.output_logprobs = self._rows.output(row)
            request.num_retractions += 1
        if requests:
            self._drop(list(range(len(requests))))
        return requests

    def _sample(self, first: int, logits: Tensor) -> list[News]:
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
        streamed = []
        for row in rows.watched:
            if row < first or row in reasons:
                continue
            matched = self._match(row)
            if matched is not None:
                reasons[row] = matched
            elif rows.requests[row].stream:
                streamed.append(News(rows.requests[row], *rows.output(row), None))
        return streamed + self._finish(reasons)

    def _match(self, row: int) -> Reason | None:
        stop = self.requests[row].generation.stop
        if not stop:
            return None
        tail = self._rows.tail(row, self._stop_strings.window(stop))
        matched = self._stop_strings.find(stop, tail)
        return None if matched is None else {"type": "stop", "matched": matched}

    def _reason(self, row: int) -> Reason:
        ids, logprobs = self._rows.output(row)
        if not math.isfinite(logprobs[-1]):
            return NOT_FINITE
        # As SGLang: at the length limit the reason is the length, also for an end token.
        if len(ids) >= self.requests[row].generation.max_new_tokens:
            return {"type": "length", "length": len(ids)}
        return {"type": "stop", "matched": ids[-1]}

    def _finish(self, reasons: dict[int, Reason]) -> list[News]:
        """End rows with their reasons and close the gaps."""
        if not reasons:
            return []
        news, broken = [], []
        for row, reason in reasons.items():
            ids, logprobs = self._rows.output(row)
            if reason is NOT_FINITE:
                broken.append(row)
                ids, logprobs = ids[:-1], logprobs[:-1]
            news.append(News(self.requests[row], ids, logprobs, reason))
        if broken:
            self._slots.wipe(torch.tensor(broken))
        self._drop(list(reasons))
        return news

    def _drop(self, rows: list[int]) -> None:
        longest = int(self._rows.lengths[: len(self._rows)].max())
        source, target = self._rows.remove(rows)
        if len(source):
            self._slots.move(source, target, longest)
        if not len(self._rows) and self._fresh_when_empty:
            self._slots.clear()
