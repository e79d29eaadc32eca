"""RoPE whose factors depend on how long a sequence is.

transformers takes the length of the longest sequence for all: in a packed pass, of whatever row is
the longest. Here each row gets the factors that it has alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_grpo.policy.attention import PackedLayout

logger = logging.getLogger(__name__)


def length_switches(config: Any) -> tuple[int, ...]:
    """Lengths beyond which a model computes in another way: sliding windows, switches of RoPE.

    Args:
        config: Of transformers.

    Returns:
        In rising order. A sequence of exactly that length is computed as a shorter one.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ("sliding_attention",))
    found: list[Any] = []
    if "sliding_attention" in kinds and getattr(text, "use_sliding_window", True):
        found.append(getattr(text, "sliding_window", None))
    if "chunked_attention" in kinds:
        found.append(getattr(text, "attention_chunk_size", None))
    for rope in _ropes(text):
        found.append(_switch(text, rope))
        if "llama_4_scaling_beta" in rope:  # queries are scaled by how far they are
            found.append(_original_length(text, rope))
    return tuple(sorted({int(length) for length in found if length}))


def longest_steady(config: Any) -> int | None:
    """Length of the longest sequence before RoPE changes the factors of all of its tokens.

    Keys that servers keep from before have the old ones: what is sampled beyond is no model's.
    None where they never change.
    """
    text = config.get_text_config()
    return min((switch for rope in _ropes(text) if (switch := _switch(text, rope))), default=None)


def usable_context(config: Any) -> int | None:
    """Tokens of the longest sequence that can be trained on; None if the config sets no limit.

    That is the model's context, or less: see `longest_steady`.
    """
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    steady = longest_steady(config)
    if steady is None or (context is not None and context <= steady):
        return context
    logger.warning(
        "sequences may have at most %d tokens, although %s has a context of %s: in longer ones it "
        "changes the factors of RoPE for all tokens, and servers keep keys with those from before",
        steady,
        config.model_type,
        context,
    )
    return steady


class RowFactors:
    """The rotary embeddings of a model whose factors depend on the length.

    Args:
        model: Its rotary embeddings are changed, in place, to heed `of_rows`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        text = model.config.get_text_config()
        ropes = [(rope, switch) for rope in _ropes(text) if (switch := _switch(text, rope))]
        self._rules = [("dynamic" in str(rope["rope_type"]), switch) for rope, switch in ropes]
        self._rotaries: list[Any] = [m for m in model.modules() if ropes and _depends_on_length(m)]
        for rotary in self._rotaries:
            rotary.groups = None
            rotary.forward = MethodType(_forward, rotary)

    def are_one(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of these lengths all have the same factors."""
        return len(self._groups(lengths)) <= 1

    @contextmanager
    def of_rows(self, layout: PackedLayout) -> Iterator[None]:
        """Within it each sequence has its own factors; those that differ share no tokens."""
        groups = self._groups(layout.lengths)
        tokens = [layout.tokens_of(rows) for rows in groups] if len(groups) > 1 else None
        for rotary in self._rotaries:
            rotary.groups = tokens
        try:
            yield
        finally:
            for rotary in self._rotaries:
                rotary.groups = None

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Sequences with the same factors, by their index."""
        found: dict[tuple[int, ...], list[int]] = {}
        for row, length in enumerate(lengths if self._rotaries else ()):
            beyond = [(grows, max(0, length - switch)) for grows, switch in self._rules]
            key = tuple(n if grows else min(n, 1) for grows, n in beyond)
            found.setdefault(key, []).append(row)
        return list(found.values())


def _forward(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    def own(positions: Tensor) -> Any:
        if dynamic:  # it remembers the longest sequence so far; a short one makes it forget
            type(self).forward(self, x, torch.zeros_like(positions[..., :1]), *args, **kwargs)
        return type(self).forward(self, x, positions, *args, **kwargs)

    dynamic = "dynamic" in str(self.rope_type)
    if self.groups is None:
        return own(position_ids)
    parts = [own(position_ids[..., index]) for index in self.groups]
    order = torch.cat(list(self.groups)).argsort()
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)[:, order]
    return tuple(torch.cat(part, 1)[:, order] for part in zip(*parts, strict=True))


def _depends_on_length(module: nn.Module) -> bool:
    kinds = str(vars(module).get("rope_type", ""))
    return "longrope" in kinds or "dynamic" in kinds


def _ropes(text: Any) -> list[Mapping[str, Any]]:
    """RoPE's parameters; several where kinds of layers have their own."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]
    return [rope for rope in nested or [parameters] if "rope_type" in rope]


def _original_length(text: Any, rope: Mapping[str, Any]) -> Any:
    return rope.get("original_max_position_embeddings") or text.max_position_embeddings


def _switch(text: Any, rope: Mapping[str, Any]) -> int | None:
    """The length beyond which all factors of a sequence change."""
    kind = str(rope["rope_type"])
    if kind == "longrope":
        return int(_original_length(text, rope))
    return int(text.max_position_embeddings) if "dynamic" in kind else None
