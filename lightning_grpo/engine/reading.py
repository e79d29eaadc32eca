"""Reading prompts: each one once, however many requests share it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_grpo.engine.kv import PromptCache, PromptState
from lightning_grpo.engine.model import ModelRunner
from lightning_grpo.engine.request import Request

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

    def forget(self) -> None:
        """Drop all cached prompts: the weights have changed."""
        self._cache.clear()

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
