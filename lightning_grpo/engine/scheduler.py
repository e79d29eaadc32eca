"""Which request gets a slot when, and what becomes of those that are stopped.

Everything here runs on one thread, between or within decode steps; see `loop`. A request is
*running* (in a slot), *waiting* (for a slot) or *held* (it came while generation was paused or
while new weights wait for the running requests to end).
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.engine.errors import BadRequestError, WeightUpdateError
from lightning_grpo.engine.kv import PromptCache, PromptState, SlotCache
from lightning_grpo.engine.model import ModelRunner
from lightning_grpo.engine.request import Output, Request
from lightning_grpo.engine.rows import Rows
from lightning_grpo.engine.sampling import Noise, sample
from lightning_grpo.engine.stopping import StopStrings

PAUSE_MODES = ("abort", "retract", "in_place")
_ABORTED: dict[str, Any] = {
    "type": "abort",
    "message": "Aborted",
    "status_code": None,
    "err_type": None,
}
_NOT_FINITE: dict[str, Any] = _ABORTED | {
    "message": "the model's logits are not finite",
    "status_code": 500,
    "err_type": "InternalServerError",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much the scheduler takes on.

    Attributes:
        max_running: Requests in slots at once.
        max_total_tokens: Tokens that the slots may hold: slots times the longest request.
        prefill_tokens: Prompt tokens read between two decode steps.
        prompt_cache_tokens: Prompt tokens kept for requests with the same prompt.
        deterministic: Read prompts one at a time, start each busy period with fresh slots, and let
            held requests in sorted by seed and prompt, so that they repeat bit for bit.
    """

    max_running: int = 64
    max_total_tokens: int = 1 << 20
    prefill_tokens: int = 4096
    prompt_cache_tokens: int = 1 << 16
    deterministic: bool = False


class Scheduler:
    """A slot engine: admits while others decode, one token for all running requests per step.

    Args:
        runner: The model.
        stop_strings: Looks for stop strings.
        limits: How much it takes on.
        weight_version: The first weights' name.
    """

    def __init__(
        self,
        runner: ModelRunner,
        stop_strings: StopStrings,
        limits: Limits,
        weight_version: str = "default",
    ) -> None:
        self.weight_version = weight_version
        self.paused = False
        self.outbox: list[tuple[Request, Output]] = []
        self.tokens_sampled = 0
        self._runner = runner
        self._limits = limits
        self._stop_strings = stop_strings
        self._noise = Noise(runner.vocab_size)
        self._slots = SlotCache(limits.max_running, runner.context_length)
        self._prompts = PromptCache(limits.prompt_cache_tokens)
        self._rows = Rows(limits.max_running, runner.vocab_size)
        self._waiting: deque[Request] = deque()
        self._held: list[Request] = []
        self._holds = 0
        self._drained: list[Future[None]] = []

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, held ones included."""
        return len(self._waiting) + len(self._held)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return not self.paused and bool(len(self._rows) or self._waiting)

    # ---- commands, between two steps ----------------------------------------------------------

    def submit(self, requests: Iterable[Request]) -> None:
        """Take requests in; they are held while generation is paused or weights are due.

        Raises:
            BadRequestError: If a request of that name is still here; none is taken then.
        """
        requests = list(requests)
        present = {r.generation.rid for r in self._all()}
        for request in requests:
            if request.generation.rid in present:
                raise BadRequestError(
                    f"`rid` must not name a request in flight, got {request.generation.rid!r}"
                )
        if self.paused or self._holds:
            self._held += requests
        else:
            self._waiting += requests

    def abort(self, rids: Iterable[str] | None) -> None:
        """End requests with what they have; all of them if `rids` is None."""
        names = None if rids is None else set(rids)

        def chosen(request: Request) -> bool:
            return names is None or request.generation.rid in names

        for request in [*self._waiting, *self._held]:
            if chosen(request):
                self._tell_stopped(request, _ABORTED)
        self._waiting = deque(r for r in self._waiting if not chosen(r))
        self._held = [r for r in self._held if not chosen(r)]
        rows = [i for i, r in enumerate(self._rows.requests) if chosen(r)]
        self._finish(dict.fromkeys(rows, _ABORTED))
        self._settle()

    def pause(self, mode: str) -> None:
        """Stop generating.

        Args:
            mode: `abort` ends what is in flight with what it has; `retract` puts it back in the
                queue, to be read again from prompt and output; `in_place` keeps it in its slots.
        """
        if mode not in PAUSE_MODES:
            raise BadRequestError(f"`mode` must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")
        self.paused = True
        if mode == "abort":
            self._held, held = [], self._held
            self.abort(None)
            self._held = held
        elif mode == "retract":
            self._retract()
        self._settle()

    def resume(self) -> None:
        """Generate again, with everything that was held."""
        self.paused = False
        self._open()

    def hold(self) -> Future[None]:
        """Keep new requests out until `release`; the result comes when none is in flight.

        A pause also brings the result: what is in flight then makes no step.
        """
        self._holds += 1
        future: Future[None] = Future()
        self._drained.append(future)
        self._settle()
        return future

    def release(self) -> None:
        """Let new requests in again."""
        self._holds -= 1
        self._open()

    def flush(self) -> bool:
        """Forget cached prompts; False (and nothing done) while requests are in flight."""
        if len(self._rows) or self._waiting:
            return False
        self._prompts.clear()
        self._slots.clear()
        return True

    def set_version(self, version: str) -> None:
        """Name the weights; tokens from here on carry the name."""
        for row, request in enumerate(self._rows.requests):
            request.note_version(version, len(self._rows.output(row)[0]))
        for request in self._waiting:
            if request.starts:
                request.note_version(version, len(request.output_ids))
        self.weight_version = version

    def update(
        self, apply: Callable[[], None], version: str | None, flush_cache: bool = False
    ) -> None:
        """Change the weights between two steps.

        Cached prompts are never used across weights, whatever `flush_cache` says.

        Args:
            apply: Writes them.
            version: Their name; None keeps the name.
            flush_cache: Refuse (with the old weights in place) if requests keep keys and values of
                the old weights.

        Raises:
            WeightUpdateError: If the flush can't be had.
        """
        if flush_cache and len(self._rows):
            raise WeightUpdateError(
                f"`flush_cache` must be false while requests are paused in place, got true with "
                f"{len(self._rows)} of them; the weights are as before"
            )
        apply()
        self._prompts.clear()
        if version is not None:
            self.set_version(version)

    # ---- one step ------------------------------------------------------------------------------

    def step(self) -> None:
        """Admit what fits and sample one token for every running request."""
        if self.paused:
            return
        running = len(self._rows)
        if running:
            logits = self._runner.decode(
                self._slots, self._rows.tokens[:running], self._rows.lengths[:running]
            )
            self._rows.advance()
            self._sample(0, logits)
        if self._waiting:
            self._admit()
        self._settle()

    def _sample(self, first: int, logits: Tensor) -> None:
        rows = self._rows
        end = first + len(logits)
        tokens, logprobs = sample(
            logits, rows.plan(first, end), self._noise, rows.banned(first, end)
        )
        ended = rows.record(first, end, tokens, logprobs)
        self.tokens_sampled += len(logits)
        reasons: dict[int, dict[str, Any]] = {}
        if bool(ended.any()):
            for row in (ended.nonzero()[:, 0] + first).tolist():
                reasons[row] = self._reason(row)
        for row in rows.watched:
            if row < first or row in reasons:
                continue
            request = rows.requests[row]
            if request.generation.stop:
                self._match_string(row, request, reasons)
            if row not in reasons and request.stream:
                self._tell(request, *rows.output(row), None)
        self._finish(reasons)

    def _match_string(self, row: int, request: Request, reasons: dict[int, dict[str, Any]]) -> None:
        stop = request.generation.stop
        matched = self._stop_strings.find(
            stop, self._rows.tail(row, self._stop_strings.window(stop))
        )
        if matched is not None:
            reasons[row] = {"type": "stop", "matched": matched}

    def _reason(self, row: int) -> dict[str, Any]:
        ids, logprobs = self._rows.output(row)
        if not math.isfinite(logprobs[-1]):
            return _NOT_FINITE
        # As SGLang: at the length limit the reason is the length, also for an end token.
        if len(ids) >= self._rows.requests[row].generation.max_new_tokens:
            return {"type": "length", "length": len(ids)}
        return {"type": "stop", "matched": ids[-1]}

    def _finish(self, reasons: dict[int, dict[str, Any]]) -> None:
        """End rows with their reasons and close the gaps."""
        if not reasons:
            return
        broken = []
        for row, reason in reasons.items():
            ids, logprobs = self._rows.output(row)
            if reason is _NOT_FINITE:
                broken.append(row)
                ids, logprobs = ids[:-1], logprobs[:-1]
            self._tell(self._rows.requests[row], ids, logprobs, reason)
        self._drop(list(reasons), broken)

    def _drop(self, rows: list[int], broken: Sequence[int] = ()) -> None:
        if broken:
            self._slots.wipe(torch.tensor(broken))
        longest = int(self._rows.lengths[: len(self._rows)].max())
        source, target = self._rows.remove(rows)
        if len(source):
            self._slots.move(source, target, longest)
        if not len(self._rows) and self._limits.deterministic:
            self._slots.clear()

    # ---- admission -----------------------------------------------------------------------------

    def _admit(self) -> None:
        batch = self._choose()
        states = self._read(batch)
        scored = [(r, s) for r, s in zip(batch, states, strict=True)]
        for request, _ in scored:
            if not request.starts:
                request.note_version(self.weight_version, 0)
            if not request.generation.max_new_tokens:
                self._tell_stopped(request, {"type": "length", "length": 0})
        placed = [(r, s) for r, s in scored if r.generation.max_new_tokens]
        if placed:
            self._place(placed)

    def _choose(self) -> list[Request]:
        """The next waiting requests that fit the slots, the memory and one round of reading."""
        longest = max((r.generation.num_positions for r in self._rows.requests), default=0)
        chosen: list[Request] = []
        tokens, seen = 0, set()
        while self._waiting and len(self._rows) + len(chosen) < self._limits.max_running:
            request = self._waiting[0]
            longest = max(longest, request.generation.num_positions)
            num = len(self._rows) + len(chosen) + 1
            ids = request.generation.input_ids
            cost = 0 if ids in seen else request.num_tokens
            full = num > 1 and num * longest > self._limits.max_total_tokens
            if full or (chosen and tokens + cost > self._limits.prefill_tokens):
                break
            seen.add(ids)
            tokens += cost
            chosen.append(self._waiting.popleft())
        return chosen

    def _read(self, batch: Sequence[Request]) -> list[PromptState]:
        """The state of each request's tokens, reading equal prompts once."""
        states: dict[Any, PromptState] = {}
        unread: dict[Any, tuple[int, ...]] = {}
        for request in batch:
            ids = request.generation.input_ids + tuple(request.output_ids)
            key = (request.generation.extra_key, ids)
            if request.generation.logprob_start is not None and request.input_logprobs is None:
                states[key] = self._score(request, ids)
                self._keep(key, states[key], request)
                continue
            known = states.get(key) or self._prompts.get(key)
            if known is not None:
                states[key] = known
            if known is not None or key in unread:
                # A retracted request keeps what was said at its first admission.
                request.cached_tokens = request.cached_tokens or len(request.generation.input_ids)
            else:
                unread[key] = ids
        for keys in self._prefill_batches(unread):
            for key, state in zip(
                keys, self._runner.prefill([unread[k] for k in keys]), strict=True
            ):
                states[key] = state
        for request in batch:
            key = (
                request.generation.extra_key,
                request.generation.input_ids + tuple(request.output_ids),
            )
            self._keep(key, states[key], request)
        return [
            states[r.generation.extra_key, r.generation.input_ids + tuple(r.output_ids)]
            for r in batch
        ]

    def _prefill_batches(self, unread: dict[Any, tuple[int, ...]]) -> list[list[Any]]:
        # One at a time where bits matter: the shape of a batch shows in the last bits of a float.
        if self._limits.deterministic:
            return [[key] for key in unread]
        batches: list[list[Any]] = []
        width = 0
        for key in sorted(unread, key=lambda k: len(unread[k])):
            width = len(unread[key])
            if batches and (len(batches[-1]) + 1) * width <= self._limits.prefill_tokens:
                batches[-1].append(key)
            else:
                batches.append([key])
        return batches

    def _score(self, request: Request, ids: tuple[int, ...]) -> PromptState:
        start = request.generation.logprob_start or 0
        state, scores = self._runner.score(ids, start)
        count = len(request.generation.input_ids) - start - 1
        request.input_logprobs = scores[:count].tolist()
        return state

    def _keep(self, key: Any, state: PromptState, request: Request) -> None:
        if not request.output_ids and bool(state.logits.isfinite().all()):
            self._prompts.put(key, state)

    def _place(self, placed: Sequence[tuple[Request, PromptState]]) -> None:
        first = len(self._rows)
        longest = max(state.num_tokens for _, state in placed)
        self._slots.reserve(first + len(placed), longest + 1, placed[0][1].kv)
        start = 0
        for index in range(1, len(placed) + 1):
            if index == len(placed) or placed[index][1] is not placed[start][1]:
                self._slots.place(first + start, index - start, placed[start][1].kv)
                start = index
        self._rows.append([request for request, _ in placed])
        self._sample(first, torch.stack([state.logits for _, state in placed]))

    # ---- telling -------------------------------------------------------------------------------

    def _tell(
        self,
        request: Request,
        ids: list[int],
        logprobs: list[float],
        reason: dict[str, Any] | None,
    ) -> None:
        output = Output(
            token_ids=ids,
            logprobs=logprobs,
            finish_reason=reason,
            spans=request.spans(len(ids)),
            weight_version=self.weight_version,
            input_logprobs=request.input_logprobs,
            cached_tokens=request.cached_tokens,
            num_retractions=request.num_retractions,
        )
        self.outbox.append((request, output))

    def _tell_stopped(self, request: Request, reason: dict[str, Any]) -> None:
        self._tell(request, request.output_ids, request.output_logprobs, reason)

    # ---- states --------------------------------------------------------------------------------

    def _all(self) -> list[Request]:
        return [*self._rows.requests, *self._waiting, *self._held]

    def _retract(self) -> None:
        running = list(self._rows.requests)
        if not running:
            return
        for row, request in enumerate(running):
            request.output_ids, request.output_logprobs = self._rows.output(row)
            request.num_retractions += 1
        self._drop(list(range(len(running))))
        self._waiting.extendleft(reversed(running))

    def _open(self) -> None:
        if self.paused or self._holds:
            return
        if self._limits.deterministic:
            self._held.sort(key=lambda r: (r.generation.input_ids, r.generation.seed))
        self._waiting += self._held
        self._held = []

    def _settle(self) -> None:
        """Tell those who wait for the engine to be empty."""
        if self._drained and (self.paused or not (len(self._rows) or self._waiting)):
            for future in self._drained:
                future.set_result(None)
            self._drained = []
