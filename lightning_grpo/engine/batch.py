"""The requests that run: a slot for each, a token for all of them in each step.

The number that chooses a token is a hash of the request's seed and the token's position in prompt
and completion. So a completion depends on neither the batch it ran in nor the requests before it,
and continues unchanged when it is aborted and submitted again with what it had. (The shape of a
batch shows in the last bits of probabilities. Where these move by 1e-6, one token in 25,000 to
400,000 changes.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.cache import SlotCache
from lightning_grpo.engine.model import ModelRunner, PromptState
from lightning_grpo.engine.requests import Generation

Reason = dict[str, Any]
"""SGLang's `finish_reason`."""

ABORTED: Reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
NOT_FINITE: Reason = ABORTED | {
    "message": "the model's logits are not finite",
    "status_code": 500,
    "err_type": "InternalServerError",
}

# ---- requests ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A completion in the engine's hands; only its thread changes it.

    Attributes:
        generation: What was asked.
        listener: Called on the server's thread with each output that is told of.
        stream: Whether every token is told of, or only the end.
        output_ids: Sampled ids.
        output_logprobs: Their logprobs.
        versions: Names of the weights that sampled them.
        input_logprobs: Logprobs of the prompt's tokens behind `logprob_start`, if asked for.
        routes: The experts of prompt and output tokens as each was read first, a row for each;
            where they are asked for.
        cached_tokens: Prompt tokens that were not read again.
        num_retractions: How often it lost its slot.
    """

    generation: Generation
    listener: Callable[[Output], None]
    stream: bool = False
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    input_logprobs: list[float] | None = None
    routes: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    num_retractions: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.generation.input_ids) + len(self.output_ids)

    def add_routes(self, rows: Tensor, start: int) -> None:
        """Take the experts of tokens from position `start` on, those that are not known yet."""
        if self.generation.return_routed_experts:
            self.routes += [row.numpy().tobytes() for row in rows[len(self.routes) - start :]]

    @property
    def only_scores(self) -> bool:
        """Whether it wants no token, only what the model thinks of its prompt."""
        return not self.generation.max_new_tokens


@dataclass(frozen=True)
class Output:
    """How far a request was at some time.

    It is read on the server's thread while the engine's runs on. That is safe, and copies nothing:
    the lists of a request that runs only grow, and one that has ended is left alone.

    Attributes:
        request: The request.
        num_tokens: Tokens that it had.
        finish_reason: SGLang's object; None while it runs.
        weight_version: Name of the weights at that time.
    """

    request: Request
    num_tokens: int
    finish_reason: Reason | None
    weight_version: str

    @property
    def token_ids(self) -> list[int]:
        """Sampled ids."""
        return self.request.output_ids[: self.num_tokens]

    @property
    def logprobs(self) -> list[float]:
        """Their logprobs."""
        return self.request.output_logprobs[: self.num_tokens]

    @property
    def routes(self) -> bytes:
        """The experts of all tokens but the newest, which was not read, int32."""
        return b"".join(self.request.routes[: self._num_read])

    @property
    def _num_read(self) -> int:
        return max(0, len(self.request.generation.input_ids) + self.num_tokens - 1)

    @property
    def spans(self) -> list[dict[str, Any]]:
        """Which weights sampled which of them."""
        spans: list[dict[str, Any]] = []
        for version, same in groupby(self.request.versions[: self.num_tokens]):
            start = spans[-1]["end"] if spans else 0
            spans.append({"version": version, "start": start, "end": start + len(list(same))})
        return spans


# ---- noise -------------------------------------------------------------------------------------

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request, in 64 bits; the first sample's is the request's."""
    seed = (seed + index * _GOLDEN) & _MASK_64
    return seed - (1 << 64) if seed >> 63 else seed


def mix_(values: Tensor) -> Tensor:
    """Hash 64-bit numbers in place (splitmix64's finalizer)."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        # A logical shift: int64's own would draw in copies of the sign.
        values ^= (values >> shift) & ((1 << (64 - shift)) - 1)
        values *= factor
    values ^= (values >> 31) & ((1 << 33) - 1)
    return values


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number above 0 and below 1 for each row, by its seed and position; fp64 `[batch]`."""
    bits = mix_(mix_(seeds.clone()) + positions)
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


# ---- sampling ----------------------------------------------------------------------------------

_KEEPS_ALL = 1 << 31
"""A `top_k` beyond every vocabulary."""


@dataclass
class SamplingPlan:
    """What the rows of a batch ask of the sampler; all tensors `[batch]`."""

    temperatures: Tensor
    top_p: Tensor
    top_k: Tensor  # 1 is greedy
    min_p: Tensor
    seeds: Tensor
    positions: Tensor  # of the tokens to sample, in prompt and completion

    def __post_init__(self) -> None:
        self.greedy = self.top_k == 1
        self.any_greedy, self.all_greedy = bool(self.greedy.any()), bool(self.greedy.all())
        self.any_scaled = bool((self.temperatures != 1).any())
        filtered = (self.top_p < 1) | (self.top_k < _KEEPS_ALL) | (self.min_p > 0)
        self.any_filtered = bool((filtered & ~self.greedy).any())

    def of_rows(self, rows: Tensor) -> SamplingPlan:
        """What some of the rows ask."""
        return SamplingPlan(*(getattr(self, each.name)[rows] for each in fields(self)))

    @classmethod
    def of(cls, requests: Sequence[Request]) -> SamplingPlan:
        """What the next token of each request asks."""
        wants = [request.generation for request in requests]
        return cls(
            temperatures=torch.tensor([w.temperature for w in wants]),
            top_p=torch.tensor([w.top_p for w in wants]),
            top_k=torch.tensor([w.top_k if w.top_k > 0 else _KEEPS_ALL for w in wants]),
            min_p=torch.tensor([w.min_p for w in wants]),
            seeds=torch.tensor([sample_seed(w.sampling_seed, w.sample) for w in wants]),
            positions=torch.tensor([request.num_tokens for request in requests]),
        )


def sample(
    logits: Tensor, plan: SamplingPlan, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token of each row.

    The logprob is that of the temperature-scaled distribution before `top_p`, `top_k`, `min_p` and
    `banned`, which is what a trainer can compute again.

    Args:
        logits: fp32 `[batch, vocab]`.
        plan: What each row asks for.
        banned: Tokens that can't be sampled now, bool `[batch, vocab]`.
    """
    if plan.any_scaled:
        logits = logits / plan.temperatures[:, None]
    logprobs = logits.log_softmax(-1)
    scores = logprobs
    # Before the filters, which could leave nothing but banned tokens.
    if banned is not None:
        scores = scores.masked_fill(banned, float("-inf"))
    if plan.any_filtered:
        scores = filter_logprobs(scores, plan)
    tokens = scores.argmax(-1) if plan.any_greedy else plan.positions
    if not plan.all_greedy:
        # In fp64, so that the sum up to a token is exact beside the smallest probability in fp32.
        mass = scores.exp().cumsum(-1, dtype=torch.float64)
        wanted = uniform(plan.seeds, plan.positions)[:, None] * mass[:, -1:]
        chosen = torch.searchsorted(mass, wanted, right=True)[:, 0]
        # Beyond the last token where the logits are not finite, which the logprob says.
        chosen.clamp_(max=mass.shape[-1] - 1)
        tokens = torch.where(plan.greedy, tokens, chosen)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def filter_logprobs(logprobs: Tensor, plan: SamplingPlan) -> Tensor:
    """Make `-inf` of what `top_k`, `top_p` or `min_p` exclude, each judged on all tokens.

    Banned ones are `-inf` before; the mass of the others counts as 1. The likeliest always stays.
    """
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    mass = ranked.exp()
    total = mass.cumsum(-1)
    # Rounding brings the mass to 1 before the last token: a row without top_p keeps all the same.
    top_p = torch.where(plan.top_p < 1, plan.top_p, float("inf"))
    rank = torch.arange(logprobs.shape[-1])
    drop = total - mass >= top_p[:, None] * total[:, -1:]
    drop |= rank >= plan.top_k[:, None]
    drop |= mass < mass[:, :1] * plan.min_p[:, None]
    drop[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


def end_tokens_banned(requests: Sequence[Request], vocab_size: int) -> Tensor | None:
    """The end tokens of requests that are too short to end, bool `[batch, vocab]`; None if none."""
    banned: Tensor | None = None
    for row, request in enumerate(requests):
        if len(request.output_ids) < request.generation.min_new_tokens:
            if banned is None:
                banned = torch.zeros(len(requests), vocab_size, dtype=torch.bool)
            banned[row, list(request.generation.stop_ids)] = True
    return banned


# ---- ends --------------------------------------------------------------------------------------


def record(
    requests: Sequence[Request], tokens: Tensor, logprobs: Tensor, version: str
) -> dict[int, Reason]:
    """Append a token to each request; returns which rows end by it, and why."""
    reasons: dict[int, Reason] = {}
    sampled = zip(requests, tokens.tolist(), logprobs.tolist(), strict=True)
    for row, (request, token, logprob) in enumerate(sampled):
        request.output_ids.append(token)
        request.output_logprobs.append(logprob)
        request.versions.append(version)
        if not math.isfinite(logprob):
            reasons[row] = NOT_FINITE
        # As SGLang 0.5.19: an end token counts before the limit, and a stop string before both.
        elif token in request.generation.stop_ids:
            reasons[row] = {"type": "stop", "matched": token}
        elif len(request.output_ids) >= request.generation.max_new_tokens:
            reasons[row] = {"type": "length", "length": len(request.output_ids)}
    return reasons


def remove(requests: list[Request], rows: Iterable[int]) -> tuple[list[int], list[int]]:
    """Drop rows and close the gaps with the last ones; returns which moved, and where to."""
    gone = set(rows)
    remaining = len(requests) - len(gone)
    gaps = [row for row in sorted(gone) if row < remaining]
    movers = [row for row in range(remaining, len(requests)) if row not in gone]
    for mover, gap in zip(movers, gaps, strict=True):
        requests[gap] = requests[mover]
    del requests[remaining:]
    return movers, gaps


def find_stop(
    tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str], token_ids: Sequence[int]
) -> str | None:
    """The first of `stop` that the newest tokens spell, special ones included; None if none."""
    if tokenizer is None or not stop:
        return None
    # A token holds a byte or more; a few beyond the longest string's bytes let a character that
    # starts before it decode whole.
    window = max(len(s.encode()) for s in stop) + 4
    text = str(tokenizer.decode(list(token_ids[-window:]), skip_special_tokens=False))
    return next((s for s in stop if s in text), None)


# ---- the batch ---------------------------------------------------------------------------------


@dataclass(eq=False)
class RunningBatch:
    """Decodes all slots together; requests come and go between two steps.

    Request `i` of `requests` is in slot `i`: when some end, the last ones move into the gaps.

    Attributes:
        runner: The model.
        tokenizer: Spells what was sampled; None: no request has stop strings.
        max_running: Most requests at once.
        tell: Called with a request that has something new to say, and why it ended (None: it runs).
        fresh_when_empty: Whether memory is given back when the last request ends, so that the next
            one finds the same shapes as the first.
    """

    runner: ModelRunner
    tokenizer: PreTrainedTokenizerBase | None
    max_running: int
    tell: Callable[[Request, Reason | None], None]
    fresh_when_empty: bool = False

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.slots = SlotCache(self.max_running, self.runner.context_length)
        self.tokens_sampled = 0
        self._newest = torch.empty(0)
        self._plan: SamplingPlan | None = None

    def __len__(self) -> int:
        return len(self.requests)

    def step(self, version: str) -> None:
        """Sample one more token for every request, by the weights of that name."""
        if not self.requests:
            return
        if self._plan is None:  # requests came since the last step
            self._plan = SamplingPlan.of(self.requests)
            self._newest = torch.tensor([request.output_ids[-1] for request in self.requests])
        plan = self._plan
        logits = self.runner.decode(self.slots, self._newest, plan.positions - 1)
        if self.runner.records:
            self._record(self.requests, [r.num_tokens - 1 for r in self.requests])
        self._newest, reasons = self._sample(0, logits, plan, version)
        plan.positions += 1
        self._finish(reasons)

    def add(self, placed: Sequence[tuple[Request, PromptState]], version: str) -> None:
        """Give requests slots behind their prompts, and sample the next token of each.

        What retracted ones had sampled is read here.
        """
        first = len(self.requests)
        placed = sorted(placed, key=lambda item: len(item[0].output_ids))
        requests, states = [r for r, _ in placed], [state for _, state in placed]
        longest = max(request.num_tokens for request in requests)
        self.slots.reserve(first + len(placed), longest + 1, states[0].kv)
        slot = first
        # Neighbors that share a prompt are filled by one copy.
        for _, group in groupby(states, key=id):
            same = list(group)
            self.slots.place(slot, len(same), same[0].kv, same[0].states)
            slot += len(same)
        self.requests += requests
        logits = torch.stack([state.logits for state in states])
        fresh = sum(not request.output_ids for request in requests)
        if fresh < len(requests):
            tails = [request.output_ids for request in requests[fresh:]]
            lengths = torch.tensor([state.num_tokens for state in states[fresh:]])
            logits[fresh:] = self.runner.extend(self.slots, tails, lengths, first + fresh)
        for request, state in placed:
            if state.routes is not None:
                request.add_routes(state.routes, 0)
        again = requests[fresh:]
        if self.runner.records:
            self._record(again, [len(request.generation.input_ids) for request in again])
        self._plan = None
        self._finish(self._sample(first, logits, SamplingPlan.of(requests), version)[1])

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
        self._drop(range(len(requests)))
        return requests

    def _record(self, requests: Sequence[Request], starts: Sequence[int]) -> None:
        """Keep the experts of what some requests had read, from a position of each on."""
        for request, rows, start in zip(requests, self.runner.take_routes(), starts, strict=True):
            request.add_routes(rows[: request.num_tokens - start], start)

    def _sample(
        self, first: int, logits: Tensor, plan: SamplingPlan, version: str
    ) -> tuple[Tensor, dict[int, Reason]]:
        """The next token of the requests from one on; and which slots end by it, and why."""
        requests = self.requests[first:]
        banned = end_tokens_banned(requests, self.runner.vocab_size)
        tokens, logprobs = sample(logits, plan, banned)
        reasons = record(requests, tokens, logprobs, version)
        self.tokens_sampled += len(requests)
        for row, request in enumerate(requests):
            if reasons.get(row) is NOT_FINITE or not (request.stream or request.generation.stop):
                continue
            matched = find_stop(self.tokenizer, request.generation.stop, request.output_ids)
            if matched is not None:
                reasons[row] = {"type": "stop", "matched": matched}
            elif request.stream and row not in reasons:
                self.tell(request, None)
        return tokens, {first + row: reason for row, reason in reasons.items()}

    def _finish(self, reasons: dict[int, Reason]) -> None:
        for row, reason in reasons.items():
            request = self.requests[row]
            if reason is NOT_FINITE:
                self.slots.wipe(row)
                del request.output_ids[-1], request.output_logprobs[-1], request.versions[-1]
            self.tell(request, reason)
        self._drop(reasons)

    def _drop(self, rows: Collection[int]) -> None:
        if not rows:
            return
        longest = max(request.num_tokens for request in self.requests)
        movers, gaps = remove(self.requests, rows)
        self.slots.move(movers, gaps, longest)
        if self._plan is not None:
            kept = torch.arange(len(self.requests))
            kept[gaps] = torch.tensor(movers, dtype=torch.int64)
            self._plan, self._newest = self._plan.of_rows(kept), self._newest[kept]
        if not self.requests and self.fresh_when_empty:
            self.slots.clear()
