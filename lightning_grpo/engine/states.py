"""What recurrent layers remember of the running requests: a state each, and a window of inputs.

transformers' own cache layers hold both and write to them where they lie. So a step hands them
views of the slots that it computes, and what they write is there for the next one. A state is that
of all tokens before: it is never cut back, and no keys and values are used without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lightning_grpo._compat import RECURRENT_KINDS, attending_layers, layer_states, set_layer_states
from lightning_grpo.engine.requests import UnservableError

States = Mapping[tuple[int, str, int], Tensor]
"""By layer, kind and number; `[rows, ...]` each."""


_GO_ON_OTHERWISE = ("zamba", "zamba2")
"""Seen in transformers 5.23: a state is dropped where several tokens are appended, or a single
token is computed otherwise; logits are 1e-2 and 1e-4 off."""


OTHERWISE = (
    "what its layers compute, as transformers has them, is not the same token by token as in one "
    "pass"
)


class RecurrentCache(DynamicCache):
    """The cache object that all layers of a model with recurrent ones see.

    Args:
        config: Of the model.

    Raises:
        UnservableError: Its layers don't go on from their states as they would in one pass.
    """

    def __init__(self, config: Any) -> None:
        if config.model_type in _GO_ON_OTHERWISE:
            raise UnservableError(OTHERWISE)
        super().__init__(config=config)
        attending = attending_layers(config.get_text_config())
        self._rows = {layer: row for row, layer in enumerate(attending)}
        self._keys: Any = None

    def begin(self, keys: Any, states: States | None = None) -> RecurrentCache:
        """Make it that of one pass.

        Args:
            keys: What attention layers see; to it they are numbered from 0, without the others.
            states: What recurrent layers start from, and write to; None: nothing.
        """
        self._keys = keys
        for (layer, kind, index), state in (states or {}).items():
            set_layer_states(self.layers[layer], kind, index, state)
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values of an attention layer; return all."""
        keys, values = self._keys.update(key_states, value_states, self._rows[layer_idx])
        return keys, values

    def states(self) -> States:
        """What recurrent layers remember after the pass."""
        return {
            (layer, kind, index): state
            for layer, held in enumerate(self.layers)
            if isinstance(held, LinearAttentionCacheLayerMixin)
            for (kind, index), state in layer_states(held).items()
        }


def is_recurrent(config: Any) -> bool:
    """Whether a model has layers that remember more than keys and values."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return not RECURRENT_KINDS.isdisjoint(kinds)


class StateSlots:
    """The states of all slots, `[slots, ...]` each; there is room for as many as were placed."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str, int], Tensor] = {}

    def clear(self) -> None:
        """Give all memory back; only while nothing runs."""
        self._held = {}

    def place(self, first_slot: int, num_slots: int, states: States) -> None:
        """Copy what was left of a prompt (without rows) into consecutive slots."""
        end = first_slot + num_slots
        for key, state in states.items():
            held = self._held.get(key)
            if held is None or len(held) < end:
                before = state.new_zeros(0, *state.shape) if held is None else held
                held = state.new_zeros(max(end, 2 * len(before)), *state.shape)
                held[: len(before)] = before
                self._held[key] = held
            held[first_slot:end] = state

    def move(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy some slots over others."""
        for held in self._held.values():
            held[list(target)] = held[list(source)]

    def wipe(self, slot: int) -> None:
        """Zero a slot."""
        for held in self._held.values():
            held[slot] = 0

    def rows(self, first_slot: int, end_slot: int) -> States:
        """Views of some slots, to compute with and write to."""
        return {key: held[first_slot:end_slot] for key, held in self._held.items()}


def row_of(states: States, row: int) -> States:
    """A copy of what is remembered of one row."""
    return {key: state[row].clone() for key, state in states.items()}


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of the same length, by their index: padding would become part of their states."""
    found: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault(length, []).append(row)
    return list(found.values())


def runs(lengths: Sequence[int], most: int) -> list[slice]:
    """Neighbors of the same length, at most so many together."""
    found: list[slice] = []
    for row, length in enumerate(lengths):
        begun = found[-1] if found else slice(0, 0)
        same = bool(found) and lengths[begun.start] == length and row - begun.start < most
        if same:
            found[-1] = slice(begun.start, row + 1)
        else:
            found.append(slice(row, row + 1))
    return found
