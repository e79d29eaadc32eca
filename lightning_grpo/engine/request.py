"""One completion while it is in the engine, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_grpo.engine.protocol import Generation


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `start` to `end` of a completion were sampled by the weights called `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Output:
    """What a completion is by now.

    Attributes:
        token_ids: Sampled ids.
        logprobs: Their logprobs.
        finish_reason: SGLang's object; None while it runs.
        spans: Which weights sampled which tokens.
        weight_version: The weights' name when this was written.
        input_logprobs: Logprobs of the prompt's tokens behind `logprob_start`, if asked for.
        cached_tokens: Prompt tokens that were not read again.
        num_retractions: How often it lost its slot.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: dict[str, Any] | None
    spans: tuple[VersionSpan, ...]
    weight_version: str
    input_logprobs: list[float] | None
    cached_tokens: int
    num_retractions: int


@dataclass(eq=False)
class Request:
    """A completion in the engine's hands; only its thread touches it.

    Attributes:
        generation: What was asked.
        listener: Called on the server's thread with each output that is told of.
        stream: Whether every token is told of, or only the end.
        output_ids: Sampled ids, up to date only while it is in no slot.
        output_logprobs: Their logprobs, likewise.
        starts: (weights' name, first token sampled by them), oldest first.
        input_logprobs: Scores of the prompt, if asked for.
        cached_tokens: Prompt tokens that were not read again.
        num_retractions: How often it lost its slot.
    """

    generation: Generation
    listener: Callable[[Output], None]
    stream: bool = False
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[str, int]] = field(default_factory=list)
    input_logprobs: list[float] | None = None
    cached_tokens: int = 0
    num_retractions: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output together; up to date only while it is in no slot."""
        return len(self.generation.input_ids) + len(self.output_ids)

    @property
    def only_scores(self) -> bool:
        """Whether it wants no token, only what the model thinks of its prompt."""
        return not self.generation.max_new_tokens

    def note_version(self, version: str, num_sampled: int) -> None:
        """Say that tokens from `num_sampled` on come from the weights called `version`."""
        while self.starts and self.starts[-1][1] >= num_sampled:
            self.starts.pop()
        if not self.starts or self.starts[-1][0] != version:
            self.starts.append((version, num_sampled))

    def spans(self, num_sampled: int) -> tuple[VersionSpan, ...]:
        """Which weights sampled which of the first `num_sampled` tokens."""
        # A request that still waits for a slot has none of either.
        ends = [*(start for _, start in self.starts[1:]), num_sampled][: len(self.starts)]
        return tuple(
            VersionSpan(version, start, end)
            for (version, start), end in zip(self.starts, ends, strict=True)
            if end > start
        )
