"""Keys and values of the running requests, one slot each, and of recent prompts.

Slots are left-aligned: token `p` of a request lies at index `p` of its slot, so a prompt's keys and
values are copied into as many slots as ask for them. Running requests always fill the first slots;
when some finish, the last ones move into the gaps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.engine.errors import UnservableError

_GROWTH = 64


class SlotCache:
    """All slots of all layers in one tensor `[layers, 2, slots, kv_heads, capacity, head_dim]`.

    It grows to what is asked for, up to `max_slots` and `max_length`, and starts empty: the shape
    of a layer is known after the first prefill.

    Args:
        max_slots: Most requests that run at once.
        max_length: Longest sequence.
    """

    def __init__(self, max_slots: int, max_length: int) -> None:
        self._max_slots = max_slots
        self._max_length = max_length
        self._store: Tensor | None = None
        self._flat: list[tuple[Tensor, Tensor]] = []

    @property
    def num_tokens_allocated(self) -> int:
        """Tokens that the memory in hand has room for."""
        return 0 if self._store is None else self._store.shape[2] * self._store.shape[4]

    def clear(self) -> None:
        """Give all memory back; only while nothing runs."""
        self._store = None
        self._flat = []

    def reserve(self, num_slots: int, length: int, like: Tensor) -> None:
        """Make room for `num_slots` slots of `length` tokens, keeping what is there.

        Args:
            num_slots: Slots needed.
            length: Tokens needed in each.
            like: Prompt keys and values `[layers, 2, kv_heads, tokens, head_dim]`.
        """
        layers, two, heads, _, dim = like.shape
        old = self._store
        slots, capacity = (0, 0) if old is None else (old.shape[2], old.shape[4])
        if num_slots <= slots and length <= capacity:
            return
        if num_slots > slots:
            slots = min(self._max_slots, max(num_slots, 2 * slots))
        if length > capacity:
            wanted = max(length, capacity + capacity // 2)
            capacity = min(self._max_length, -(-wanted // _GROWTH) * _GROWTH)
        # Zeros, since what the mask hides is still multiplied by zero, and 0 * nan is nan.
        store = torch.zeros(layers, two, slots, heads, capacity, dim, dtype=like.dtype)
        if old is not None:
            store[:, :, : old.shape[2], :, : old.shape[4]] = old
        self._set(store)

    def grow(self, length: int) -> None:
        """Make room for sequences of `length` tokens in the slots that there are."""
        if self._store is None:
            raise RuntimeError("no slot was ever filled")
        if length > self._store.shape[4]:
            self.reserve(self._store.shape[2], length, self._store[:, :, 0])

    def place(self, first_slot: int, num_slots: int, prompt: Tensor) -> None:
        """Copy a prompt's keys and values into consecutive slots (reserved before).

        Args:
            first_slot: The first of the slots.
            num_slots: How many.
            prompt: `[layers, 2, kv_heads, tokens, head_dim]`.
        """
        if self._store is None:
            raise RuntimeError("reserve() comes before place()")
        rows = slice(first_slot, first_slot + num_slots)
        self._store[:, :, rows, :, : prompt.shape[3]] = prompt[:, :, None]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` tokens of some slots over others, `[moves]` each."""
        if self._store is not None:
            self._store[:, :, target, :, :length] = self._store[:, :, source, :, :length]

    def wipe(self, slots: Tensor) -> None:
        """Zero some slots, so that no non-finite number stays behind the mask."""
        if self._store is not None:
            self._store[:, :, slots] = 0

    def step(self, positions: Tensor, max_length: int, first_slot: int = 0) -> DecodeStep:
        """What one step of `len(positions)` slots writes to and reads from.

        Args:
            positions: Where the new tokens of each slot go, `[slots, tokens]`.
            max_length: The largest of `positions`, plus one.
            first_slot: Of them.
        """
        if self._store is None:
            raise RuntimeError("no slot was ever filled")
        heads, capacity = self._store.shape[3], self._store.shape[4]
        end_slot = first_slot + len(positions)
        starts = torch.arange(first_slot * heads, end_slot * heads) * capacity
        index = starts.view(-1, heads, 1) + positions[:, None]
        window = self._store[:, :, first_slot:end_slot, :, :max_length]
        return DecodeStep(self._flat, window, index.flatten())

    def _set(self, store: Tensor) -> None:
        self._store = store
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
        flat_keys, flat_values = self._flat[layer_idx]
        flat_keys.index_copy_(0, self._index, keys.reshape(-1, keys.shape[-1]))
        flat_values.index_copy_(0, self._index, values.reshape(-1, values.shape[-1]))
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
        self._layers.append((keys, values))
        return keys, values

    def prompt(self, row: int, length: int) -> Tensor:
        """One prompt's keys and values, `[layers, 2, kv_heads, length, head_dim]`."""
        return torch.stack([kv[row, :, :length] for layer in self._layers for kv in layer]).view(
            len(self._layers), 2, *self._layers[0][0].shape[1:2], length, -1
        )


@dataclass(frozen=True)
class PromptState:
    """What is left of a prompt that was read.

    Attributes:
        kv: Keys and values `[layers, 2, kv_heads, tokens, head_dim]`.
        logits: Logits of the token after the prompt, `[vocab]`.
    """

    kv: Tensor
    logits: Tensor

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return self.kv.shape[3]


class PromptCache:
    """Recently read prompts, so that the samples of a group share one prefill.

    Args:
        max_tokens: Prompt tokens kept; the least recently used go first.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._states: OrderedDict[Hashable, PromptState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Hashable) -> PromptState | None:
        """The state of a prompt, which becomes the most recent; None if it is not kept."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: Hashable, state: PromptState) -> None:
        """Keep a prompt, evicting old ones where there is no room."""
        if state.num_tokens > self._max_tokens or key in self._states:
            return
        self._states[key] = state
        self._num_tokens += state.num_tokens
        while self._num_tokens > self._max_tokens:
            _, old = self._states.popitem(last=False)
            self._num_tokens -= old.num_tokens

    def clear(self) -> None:
        """Forget all prompts."""
        self._states.clear()
        self._num_tokens = 0
