"""Which request gets a slot when, and what becomes of those that are stopped.

The engine's thread runs commands, a decode step, answers, and again. All of the scheduler runs on
it, so that nothing in it needs a lock: whatever the server wants done is a command that runs
between two decode steps. A request is *running* (in a slot), *waiting* (for a slot) or *held* (it
came while generation was paused or while new weights wait for the running requests to end).
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.model import ModelRunner, PromptCache, PromptState
from lightning_grpo.engine.requests import BadRequestError, Output, Request, WeightUpdateError
from lightning_grpo.engine.slots import ABORTED, Reason, RunningBatch
from lightning_grpo.errors import GRPOError

Key = tuple[str | None, tuple[int, ...]]
"""(extra_key, tokens): requests with equal keys share keys and values."""


class PromptReader:
    """Makes the state that requests start from: keys, values and the next token's logits.

    Args:
        runner: The model.
        cache: States of recent prompts, all of the weights in place.
        max_batch_tokens: Most tokens read in one pass, padding included; a longer prompt is read
            alone.
    """

    def __init__(self, runner: ModelRunner, cache: PromptCache, max_batch_tokens: int) -> None:
        self._runner = runner
        self._cache = cache
        self._max_batch_tokens = max_batch_tokens

    def read(self, requests: Sequence[Request]) -> list[PromptState]:
        """The state of each request's prompt."""
        keys = [_key(request) for request in requests]
        states: dict[Key, PromptState] = {}
        unread: set[Key] = set()
        for key, request in zip(keys, requests, strict=True):
            if request.generation.logprob_start is not None and request.input_logprobs is None:
                states[key] = self._score(request)
                continue
            known = states.get(key) or self._cache.get(key)
            if known is None and key not in unread:
                unread.add(key)
                continue
            if known is not None:
                states[key] = known
            # A retracted request keeps what was said at its first admission.
            request.cached_tokens = request.cached_tokens or len(request.generation.input_ids)
        for batch in self._batches(unread):
            states.update(zip(batch, self._runner.prefill([k[1] for k in batch]), strict=True))
        for key, state in states.items():
            # Non-finite weights leave nothing to share.
            if bool(state.logits.isfinite().all()):
                self._cache.put(key, state)
        return [states[key] for key in keys]

    def _batches(self, keys: set[Key]) -> list[list[Key]]:
        """Prompts to read together, of about the same length since they are padded."""
        batches: list[list[Key]] = []
        for key in sorted(keys, key=lambda k: (len(k[1]), k[1], k[0] or "")):
            if batches and (len(batches[-1]) + 1) * len(key[1]) <= self._max_batch_tokens:
                batches[-1].append(key)
            else:
                batches.append([key])
        return batches

    def _score(self, request: Request) -> PromptState:
        start = request.generation.logprob_start or 0
        state, scores = self._runner.score(_key(request)[1], start)
        count = len(request.generation.input_ids) - start - 1
        request.input_logprobs = scores[:count].tolist()
        return state


def _key(request: Request) -> Key:
    return (request.generation.extra_key, request.generation.input_ids)


PAUSE_MODES = ("abort", "retract", "in_place")


@dataclass(frozen=True)
class Limits:
    """How much the scheduler takes on.

    Attributes:
        max_running: Requests in slots at once.
        max_total_tokens: Tokens that the slots may hold: slots times the longest request.
        prefill_tokens: Prompt tokens read between two decode steps.
        prompt_cache_tokens: Prompt tokens kept for requests with the same prompt.
        deterministic: Read prompts one at a time, start each busy period with fresh slots, and let
            held requests in sorted by prompt and seed; with a runner that decodes row by row
            everything repeats bit for bit.
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
        tokenizer: Spells what was sampled, for stop strings.
        limits: How much it takes on.
        weight_version: The first weights' name.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | None,
        limits: Limits,
        weight_version: str = "default",
    ) -> None:
        self.weight_version = weight_version
        self.paused = False
        self.outbox: list[tuple[Request, Output]] = []
        self._limits = limits
        self._running = RunningBatch(
            *(runner, tokenizer, limits.max_running, self._tell),
            fresh_when_empty=limits.deterministic,
        )
        self._prompts = PromptCache(limits.prompt_cache_tokens)
        # The shape of a batch shows in the last bits of a float.
        self._reader = PromptReader(
            runner, self._prompts, 1 if limits.deterministic else limits.prefill_tokens
        )
        self._waiting: deque[Request] = deque()
        self._held: list[Request] = []
        self._holds = 0
        self._drained: list[Future[None]] = []

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def tokens_sampled(self) -> int:
        """Tokens sampled since the start."""
        return self._running.tokens_sampled

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, held ones included."""
        return len(self._waiting) + len(self._held)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return not self.paused and bool(len(self._running) or self._waiting)

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
        self._held += requests
        self._open()

    def abort(self, rids: Iterable[str] | None) -> None:
        """End requests with what they have; all of them if `rids` is None."""
        names = None if rids is None else set(rids)

        def chosen(request: Request) -> bool:
            return names is None or request.generation.rid in names

        for request in [*self._waiting, *self._held]:
            if chosen(request):
                self._tell(request, ABORTED)
        self._waiting = deque(r for r in self._waiting if not chosen(r))
        self._held = [r for r in self._held if not chosen(r)]
        self._running.end([r for r in self._running.requests if chosen(r)], ABORTED)
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
            self._waiting.extendleft(reversed(self._running.take_back()))
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
        future.set_running_or_notify_cancel()
        self._drained.append(future)
        self._settle()
        return future

    def release(self) -> None:
        """Let new requests in again."""
        self._holds -= 1
        self._open()

    def flush(self) -> bool:
        """Forget cached prompts; False (and nothing done) while requests are in flight."""
        if len(self._running) or self._waiting:
            return False
        self._prompts.clear()
        self._running.free_memory()
        return True

    def set_version(self, version: str) -> None:
        """Name the weights; tokens from here on carry the name."""
        for request in (*self._running.requests, *self._waiting):
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
        if flush_cache and len(self._running):
            raise WeightUpdateError(
                f"`flush_cache` must be false while requests are paused in place, got true with "
                f"{len(self._running)} of them; the weights are as before"
            )
        apply()
        self._prompts.clear()
        if version is not None:
            self.set_version(version)

    def step(self) -> None:
        """Admit what fits and sample one token for every running request."""
        if self.paused:
            return
        self._running.step()
        if self._waiting and (self._waiting[0].only_scores or self._has_room()):
            self._admit()
        self._settle()

    def _has_room(self) -> bool:
        """Whether enough slots are free to read prompts for.

        Reading holds the running requests up by a pass of its own, so those that wait behind full
        slots come many at a time, not one for each that ends.
        """
        free = self._limits.max_running - len(self._running)
        return free >= min(len(self._waiting), self._limits.max_running // 2)

    def _admit(self) -> None:
        batch = self._choose()
        states = self._reader.read(batch)
        for request in batch:
            if not request.starts:
                request.note_version(self.weight_version, 0)
            if request.only_scores:
                self._tell(request, {"type": "length", "length": 0})
        if batch and not batch[0].only_scores:
            self._running.add(list(zip(batch, states, strict=True)))

    def _choose(self) -> list[Request]:
        """The next waiting requests that fit the slots, the memory and one round of reading.

        Those that only score need no slot, and are answered before others are read.
        """
        if self._waiting[0].only_scores:
            return [self._waiting.popleft()]
        longest = max((r.generation.num_positions for r in self._running.requests), default=0)
        chosen: list[Request] = []
        tokens, seen = 0, set()
        while self._waiting and len(self._running) + len(chosen) < self._limits.max_running:
            request = self._waiting[0]
            longest = max(longest, request.generation.num_positions)
            num = len(self._running) + len(chosen) + 1
            ids = request.generation.input_ids
            cost = len(request.output_ids) + (0 if ids in seen else len(ids))
            full = num > 1 and num * longest > self._limits.max_total_tokens
            if full or (chosen and tokens + cost > self._limits.prefill_tokens):
                break
            seen.add(ids)
            tokens += cost
            chosen.append(self._waiting.popleft())
        return chosen

    def _tell(self, request: Request, reason: Reason | None) -> None:
        self.outbox.append((request, request.output(reason, self.weight_version)))

    def _all(self) -> list[Request]:
        return [*self._running.requests, *self._waiting, *self._held]

    def _open(self) -> None:
        if self.paused or self._holds:
            return
        if self._limits.deterministic:
            self._held.sort(key=lambda r: (r.generation.input_ids, r.generation.seed))
        self._waiting.extend(r for r in self._held if not r.only_scores)
        self._waiting.extendleft(r for r in reversed(self._held) if r.only_scores)
        self._held = []

    def _settle(self) -> None:
        """Tell those who wait for the engine to be empty."""
        if self._drained and (self.paused or not (len(self._running) or self._waiting)):
            for future in self._drained:
                future.set_result(None)
            self._drained = []


T = TypeVar("T")


class EngineThread:
    """Runs a scheduler until the process ends.

    A failure of a step ends the process with its traceback: an engine that can't decode must not
    leave its clients waiting.

    Args:
        scheduler: What it runs.
        loop: Where listeners are called.
    """

    def __init__(self, scheduler: Scheduler, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduler = scheduler
        self._loop = loop
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step and wait for it."""

        def end() -> None:
            self._stopping = True

        self._commands.put(end)
        self._thread.join()

    async def call(self, function: Callable[[Scheduler], T]) -> T:
        """Run `function` on the engine's thread between two steps.

        What it refuses is raised here; any other error of it ends the process. A caller who is
        cancelled can't know whether it ran.
        """
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._scheduler))
            except GRPOError as error:
                future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    def post(self, function: Callable[[Scheduler], None]) -> None:
        """Run `function` on the engine's thread and don't wait; it must not raise."""
        self._commands.put(lambda: function(self._scheduler))

    def _run(self) -> None:
        try:
            # OpenMP counts threads for each thread anew; a second one only costs at this size.
            torch.set_num_threads(1)
            # Around everything: tensors made in this mode can only be written to in it.
            with torch.inference_mode():
                while not self._stopping:
                    self._run_commands()
                    self._scheduler.step()
                    self._deliver()
        except BaseException:  # noqa: BLE001 - nobody is left to hear of it
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _run_commands(self) -> None:
        """Run what has come; wait for something if there is nothing else to do."""
        if not self._scheduler.has_work:
            # What the last command said must go out before the wait.
            self._deliver()
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _deliver(self) -> None:
        outbox = self._scheduler.outbox
        if outbox:
            self._scheduler.outbox = []
            self._loop.call_soon_threadsafe(_tell_listeners, outbox)


def _tell_listeners(outbox: list[tuple[Request, Output]]) -> None:
    for request, output in outbox:
        request.listener(output)
