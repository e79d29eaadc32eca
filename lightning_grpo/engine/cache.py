"""What layers remember of the running requests: keys and values, states of recurrent ones.

A running request has a slot. Slots are left-aligned: token `p` of a request is at index `p` of its
slot, so a prompt's keys and values are copied into as many slots as ask for them.

Recurrent layers have a state each, and a window of inputs. transformers' own cache layers hold both
and write to them where they lie. So a step hands them views of the slots that it computes, and what
they write is there for the next one. A state is that of all tokens before: it is never cut back,
and no keys and values are used without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
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


_GROWTH = 64
"""Tokens by which slots grow."""


class SlotCache:
    """All slots of all layers: `store` is `[layers, 2, slots, kv_heads, capacity, head_dim]`.

    It grows to what is asked for, up to `max_slots` and `max_length`, and starts empty: the shape
    of a layer is known after the first prompt, whose `[layers, 2, kv_heads, tokens, head_dim]` are
    handed in.
    """

    def __init__(self, max_slots: int, max_length: int) -> None:
        self._max_slots = max_slots
        self._max_length = max_length
        self.states = StateSlots()
        self.clear()

    def clear(self) -> None:
        """Give all memory back; only while nothing runs."""
        self._set(torch.empty(0, 2, 0, 1, 0, 1))
        self.states.clear()

    def reserve(self, num_slots: int, length: int, like: Tensor) -> None:
        """Make room for slots of a length for prompts like that one, keeping what is there."""
        layers, two, heads, _, dim = like.shape
        old = self.store
        slots, capacity = old.shape[2], old.shape[4]
        if num_slots <= slots and length <= capacity:
            return
        if num_slots > slots:
            slots = min(self._max_slots, max(num_slots, 2 * slots))
        if length > capacity:
            wanted = max(length, capacity + capacity // 2)
            capacity = min(self._max_length, -(-wanted // _GROWTH) * _GROWTH)
        # Zeros, since what the mask hides is still multiplied by zero, and 0 * nan is nan.
        store = torch.zeros(layers, two, slots, heads, capacity, dim, dtype=like.dtype)
        if old.numel():
            store[:, :, : old.shape[2], :, : old.shape[4]] = old
        self._set(store)

    def grow(self, length: int) -> None:
        """Make room for sequences of `length` tokens in the slots that there are."""
        if length > self.store.shape[4]:
            self.reserve(self.store.shape[2], length, self.store[:, :, 0])

    def place(
        self, first_slot: int, num_slots: int, prompt: Tensor, states: States | None = None
    ) -> None:
        """Copy what was read of a prompt into consecutive slots, which were reserved.

        Args:
            first_slot: The first of them.
            num_slots: How many.
            prompt: Keys and values.
            states: What recurrent layers remember at its end.
        """
        rows = slice(first_slot, first_slot + num_slots)
        self.store[:, :, rows, :, : prompt.shape[3]] = prompt[:, :, None]
        self.states.place(first_slot, num_slots, states or {})

    def move(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of some slots over others."""
        if source:
            self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]
            self.states.move(source, target)

    def wipe(self, slot: int) -> None:
        """Zero a slot, so that no non-finite number stays behind the mask."""
        self.store[:, :, slot] = 0
        self.states.wipe(slot)

    def step(self, positions: Tensor, max_length: int, first_slot: int = 0) -> DecodeStep:
        """What a step writes to and reads from; `positions` of new tokens, `[slots, tokens]`."""
        heads, capacity = self.store.shape[3], self.store.shape[4]
        end_slot = first_slot + len(positions)
        starts = torch.arange(first_slot * heads, end_slot * heads) * capacity
        index = starts.view(-1, heads, 1) + positions[:, None]
        window = self.store[:, :, first_slot:end_slot, :, :max_length]
        return DecodeStep(self._flat, window, index.flatten())

    def _set(self, store: Tensor) -> None:
        self.store = store
        dim = store.shape[-1]
        self._flat = [(layer[0].view(-1, dim), layer[1].view(-1, dim)) for layer in store]


class DecodeStep:
    """The cache object that transformers' attention layers see while tokens are appended."""

    def __init__(self, flat: list[tuple[Tensor, Tensor]], window: Tensor, index: Tensor) -> None:
        self._flat = flat
        self._window = window
        self._index = index

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[slots, kv_heads, tokens, head_dim]`; return all."""
        for flat, new in zip(self._flat[layer_idx], (keys, values), strict=True):
            flat.index_copy_(0, self._index, new.reshape(-1, new.shape[-1]))
        window = self._window[layer_idx]
        return window[0], window[1]


class PrefillCapture:
    """The cache object that transformers' attention layers see while reading prompts."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Remember a layer's keys and values `[prompts, kv_heads, tokens, head_dim]`."""
        if layer_idx != len(self._layers):
            raise UnservableError(f"layer {layer_idx} came when layer {len(self._layers)} was due")
        if keys.shape != values.shape:
            raise UnservableError(
                f"its keys {list(keys.shape[1:])} and values {list(values.shape[1:])} differ in "
                "shape (multi-head latent attention)"
            )
        if self._layers and keys.shape != self._layers[0][0].shape:
            first, here = (list(each.shape[1:]) for each in (self._layers[0][0], keys))
            raise UnservableError(
                f"the keys of its layers differ in shape: {first} in the first, {here} in layer "
                f"{layer_idx}"
            )
        self._layers.append((keys, values))
        return keys, values

    def prompt(self, row: int, length: int) -> Tensor:
        """One prompt's keys and values, `[layers, 2, kv_heads, length, head_dim]`."""
        tensors = [kv[row, :, :length] for layer in self._layers for kv in layer]
        if not tensors:  # no layer has attention
            return torch.empty(0, 2, 1, length, 1)
        return torch.stack(tensors).unflatten(0, (-1, 2))
