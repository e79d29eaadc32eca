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
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.batch import ABORTED, Output, Reason, Request, RunningBatch
from lightning_grpo.engine.model import ModelRunner, PromptState
from lightning_grpo.engine.requests import BadRequestError, Generation, WeightUpdateError
from lightning_grpo.errors import BusyError, GRPOError

T = TypeVar("T")

PAUSE_MODES = ("abort", "retract", "in_place")
_MAX_OPEN = 1 << 16
"""Most completions in flight, of all requests together; more are sent away for a moment."""

Key = tuple[str | None, tuple[int, ...]]
"""(extra_key, tokens): requests with equal keys share keys and values."""


@dataclass(eq=False)
class PromptReader:
    """Makes the state that requests start from: keys, values and the next token's logits.

    It is kept for a while, so that the samples of a group share one reading.

    Attributes:
        runner: The model.
        max_batch_tokens: Most tokens read in one pass, padding included, unless of one prompt.
        max_kept_tokens: Most tokens of prompts kept; the least recently used go first.
    """

    runner: ModelRunner
    max_batch_tokens: int
    max_kept_tokens: int

    def __post_init__(self) -> None:
        self._kept: OrderedDict[Key, PromptState] = OrderedDict()

    def forget(self) -> None:
        """Keep none: other weights, or no more memory, for them."""
        self._kept.clear()

    def read(self, requests: Sequence[Request]) -> list[PromptState]:
        """The state of each request's prompt."""
        states: dict[Key, PromptState] = {}
        unread: set[Key] = set()
        for request in requests:
            key = _key(request)
            if request.generation.logprob_start is not None and request.input_logprobs is None:
                states[key] = self._score(request, request.generation.logprob_start)
                self._keep(key, states[key])
                continue
            if key in self._kept:
                self._kept.move_to_end(key)
                states.setdefault(key, self._kept[key])
            if key in states or key in unread:
                # A retracted request keeps what was said at its first admission.
                request.cached_tokens = request.cached_tokens or len(request.generation.input_ids)
            else:
                unread.add(key)
        for batch in self._batches(unread):
            for key, state in zip(batch, self.runner.prefill([k[1] for k in batch]), strict=True):
                states[key] = state
                self._keep(key, state)
        self._trim()
        return [states[_key(request)] for request in requests]

    def _keep(self, key: Key, state: PromptState) -> None:
        # Non-finite weights leave nothing to share.
        if state.size <= self.max_kept_tokens and bool(state.logits.isfinite().all()):
            self._kept[key] = state
            self._kept.move_to_end(key)

    def _trim(self) -> None:
        excess = sum(state.size for state in self._kept.values()) - self.max_kept_tokens
        while excess > 0:
            excess -= self._kept.popitem(last=False)[1].size

    def _batches(self, keys: set[Key]) -> list[list[Key]]:
        """Prompts to read together, of about the same length since they are padded."""
        batches: list[list[Key]] = []
        for key in sorted(keys, key=lambda k: (len(k[1]), k[1], k[0] or "")):
            if batches and (len(batches[-1]) + 1) * len(key[1]) <= self.max_batch_tokens:
                batches[-1].append(key)
            else:
                batches.append([key])
        return batches

    def _score(self, request: Request, start: int) -> PromptState:
        state, scores = self.runner.score(request.generation.input_ids, start)
        request.input_logprobs = scores.tolist()
        return state


def _key(request: Request) -> Key:
    return (request.generation.extra_key, request.generation.input_ids)


def _repeatable_order(request: Request) -> tuple[tuple[int, ...], int, int]:
    asked = request.generation
    return (asked.input_ids, asked.sampling_seed, asked.sample)


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
    """A slot engine: admits while others decode, one token for all running requests per step."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | None,
        limits: Limits,
        weight_version: str = "default",
    ) -> None:
        self.weight_version = weight_version
        self.paused = False
        self.outbox: list[Output] = []
        self.running = RunningBatch(
            *(runner, tokenizer, limits.max_running, self._tell, limits.deterministic)
        )
        self._limits = limits
        # The shape of a batch shows in the last bits of a float.
        batch_tokens = 1 if limits.deterministic else limits.prefill_tokens
        self._prompts = PromptReader(runner, batch_tokens, limits.prompt_cache_tokens)
        self._waiting: deque[Request] = deque()
        self._held: list[Request] = []
        self._holds = 0
        self._drained: list[Future[None]] = []

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, held ones included."""
        return len(self._waiting) + len(self._held)

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight; held ones are not."""
        return not (self.running or self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return not (self.paused or self.is_idle)

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests in; they are held while generation is paused or weights are due.

        Raises:
            BadRequestError: If a request of that name is still here; none is taken then.
        """
        present = {r.generation.rid for r in (*self.running.requests, *self._waiting, *self._held)}
        for request in requests:
            if request.generation.rid in present:
                raise BadRequestError(
                    f"`rid` must not name a request in flight, got {request.generation.rid!r}"
                )
        asks = any(request.generation.return_routed_experts for request in requests)
        if asks and not self.running.runner.records:
            self.running.runner.record()
            self._prompts.forget()  # of those read before nobody knows
        self._held += requests
        self._open()

    def abort(self, rids: Iterable[str] | None) -> None:
        """End requests with what they have; all of them if `rids` is None."""
        names = None if rids is None else set(rids)

        def chosen(request: Request) -> bool:
            return names is None or request.generation.rid in names

        for request in (*self._waiting, *self._held):
            if chosen(request):
                self._tell(request, ABORTED)
        self._waiting = deque(r for r in self._waiting if not chosen(r))
        self._held = [r for r in self._held if not chosen(r)]
        self.running.end([r for r in self.running.requests if chosen(r)], ABORTED)
        self._settle()

    def pause(self, mode: str) -> None:
        """Stop generating.

        Mode `abort` ends what is in flight with what it has; `retract` puts it back in the queue,
        to be read again from prompt and output; `in_place` keeps it in its slots.
        """
        if mode not in PAUSE_MODES:
            raise BadRequestError(f"`mode` must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")
        self.paused = True
        if mode == "abort":
            self._held, held = [], self._held
            self.abort(None)
            self._held = held
        elif mode == "retract":
            self._waiting.extendleft(reversed(self.running.take_back()))
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
        if self.is_idle:
            self._prompts.forget()
            self.running.slots.clear()
        return self.is_idle

    def set_version(self, version: str) -> None:
        """Name the weights; tokens from here on carry the name."""
        self.weight_version = version

    def update(
        self, apply: Callable[[], None], version: str | None, flush_cache: bool = False
    ) -> None:
        """Change the weights between two steps, and their name, unless that is None.

        Cached prompts are never used across weights, whatever `flush_cache` says.

        Raises:
            WeightUpdateError: Requests keep keys and values of the old weights against
                `flush_cache`; the old weights are in place.
        """
        if flush_cache and len(self.running):
            raise WeightUpdateError(
                f"`flush_cache` must be false while requests are paused in place, got true with "
                f"{len(self.running)} of them; the weights are as before"
            )
        apply()
        self._prompts.forget()
        self.set_version(self.weight_version if version is None else version)

    def step(self) -> None:
        """Admit what fits and sample one token for every running request."""
        if self.paused:
            return
        self.running.step(self.weight_version)
        if self._waiting and (self._waiting[0].only_scores or self._has_room()):
            self._admit()
        self._settle()

    def _has_room(self) -> bool:
        """Whether enough slots are free to read prompts for.

        Reading holds the running requests up by a pass of its own, so those that wait behind full
        slots come many at a time, not one for each that ends.
        """
        free = self._limits.max_running - len(self.running)
        return free >= min(len(self._waiting), self._limits.max_running // 2)

    def _admit(self) -> None:
        batch = self._choose()
        states = self._prompts.read(batch)
        if batch and batch[0].only_scores:
            self._tell(batch[0], {"type": "length", "length": 0})
        elif batch:
            self.running.add(list(zip(batch, states, strict=True)), self.weight_version)

    def _choose(self) -> list[Request]:
        """The next waiting requests that fit the slots, the memory and one round of reading.

        Those that only score need no slot, and are answered before others are read.
        """
        if self._waiting[0].only_scores:
            return [self._waiting.popleft()]
        limits, running = self._limits, len(self.running)
        longest = max((r.generation.num_positions for r in self.running.requests), default=0)
        chosen: list[Request] = []
        tokens, seen = 0, set()
        while self._waiting and running + len(chosen) < limits.max_running:
            request, num = self._waiting[0], running + len(chosen) + 1
            ids = request.generation.input_ids
            longest = max(longest, request.generation.num_positions)
            tokens += len(request.output_ids) + (0 if ids in seen else len(ids))
            full = num > 1 and num * longest > limits.max_total_tokens
            if full or (chosen and tokens > limits.prefill_tokens):
                break
            seen.add(ids)
            chosen.append(self._waiting.popleft())
        return chosen

    def _tell(self, request: Request, reason: Reason | None) -> None:
        num_tokens = len(request.output_ids)
        self.outbox.append(Output(request, num_tokens, reason, self.weight_version))

    def _open(self) -> None:
        if self.paused or self._holds:
            return
        if self._limits.deterministic:
            self._held.sort(key=_repeatable_order)
        self._waiting.extend(r for r in self._held if not r.only_scores)
        self._waiting.extendleft(r for r in reversed(self._held) if r.only_scores)
        self._held = []

    def _settle(self) -> None:
        """Tell those who wait for the engine to be empty."""
        if self.paused or self.is_idle:
            drained, self._drained = self._drained, []
            for future in drained:
                future.set_result(None)


class Unread:
    """What a stream has not told yet: the newest output of each completion, which holds the others.

    So a reader who is slow, or stops, costs no more memory than one who waits for the end.
    """

    def __init__(self) -> None:
        self._newest: dict[int, Output] = {}
        self._some = asyncio.Event()

    def put(self, index: int, output: Output) -> None:
        """What a completion is by now."""
        self._newest[index] = output
        self._some.set()

    async def get(self) -> tuple[int, Output]:
        """The completion that has waited longest to be told of, and what it is."""
        await self._some.wait()
        index = next(iter(self._newest))
        output = self._newest.pop(index)
        if not self._newest:
            self._some.clear()
        return index, output


class EngineThread:
    """Runs a scheduler until the process ends.

    A failure of a step ends the process with its traceback: an engine that can't decode must not
    leave its clients waiting.

    Args:
        scheduler: What it runs.
        loop: Of the server; listeners are called on it.
    """

    def __init__(self, scheduler: Scheduler, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduler = scheduler
        self._loop = loop
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._num_open = 0
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

    @asynccontextmanager
    async def sample(
        self, generations: Sequence[Generation], *, stream: bool
    ) -> AsyncIterator[AsyncIterator[tuple[int, Output]]]:
        """The outputs of completions, by index, until all have ended: of each token, if streamed.

        Those that still run when the block is left, because nobody waits for them, are aborted.

        Raises:
            BadRequestError: A request of that name is in flight.
            BusyError: Too many are.
        """
        if self._num_open + len(generations) > _MAX_OPEN:
            raise BusyError(f"{self._num_open} completions are in flight, of at most {_MAX_OPEN}")
        unread = Unread()
        running: set[str] = set()

        async def outputs() -> AsyncIterator[tuple[int, Output]]:
            while running:
                index, output = await unread.get()
                if output.finish_reason is not None:
                    running.discard(generations[index].rid)
                yield index, output

        requests = [Request(g, partial(unread.put, i), stream) for i, g in enumerate(generations)]
        running.update(generation.rid for generation in generations)
        self._num_open += len(generations)
        try:
            await self.call(lambda s: s.submit(requests))
            yield outputs()
        except BadRequestError:  # none was taken: the name is another's
            running.clear()
            raise
        finally:
            self._num_open -= len(generations)
            if running:
                self.post(lambda s: s.abort(sorted(running)))

    async def finish(self, generations: Sequence[Generation]) -> list[Output]:
        """What completions have become, in their order."""
        async with self.sample(generations, stream=False) as outputs:
            ended = {index: output async for index, output in outputs}
        return [ended[index] for index in range(len(generations))]

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
        while not self._commands.empty():  # nobody else takes any
            self._commands.get()()

    def _deliver(self) -> None:
        outbox = self._scheduler.outbox
        if outbox:
            self._scheduler.outbox = []
            self._loop.call_soon_threadsafe(_tell_listeners, outbox)


def _tell_listeners(outbox: list[Output]) -> None:
    for output in outbox:
        output.request.listener(output)
