"""RoPE whose factors depend on how long a sequence is.

transformers takes the length of the longest sequence for all: in a packed pass, of whatever row is
the longest. Here each row gets the factors that it has alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


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

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows with the same factors, by their index; one group where the length makes none."""
        found: dict[tuple[int, ...], list[int]] = {}
        for row, length in enumerate(lengths):
            beyond = [max(0, length - switch) for _, switch in self._rules]
            each = zip(self._rules, beyond, strict=True)
            found.setdefault(tuple(n if grows else n > 0 for (grows, _), n in each), []).append(row)
        return list(found.values())

    @contextmanager
    def of_rows(self, groups: Sequence[Tensor] | None) -> Iterator[None]:
        """Within it each group of tokens, int64 positions, has its own factors; None: one group."""
        for rotary in self._rotaries:
            rotary.groups = groups
        try:
            yield
        finally:
            for rotary in self._rotaries:
                rotary.groups = None


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
