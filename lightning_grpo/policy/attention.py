"""Attention of packed sequences, and rotary embeddings for each of them.

An attention implementation of transformers: each token sees its own sequence only. On GPUs in half
precision torch's variable-length kernel does it; elsewhere sequences of similar length are padded
together, which a causal mask makes free of masks: padding stands at the right, where no real token
looks. Soft caps and sinks, which no kernel knows, are computed in the padded form everywhere
(`algorithm.layers`).

RoPE whose factors depend on how long a sequence is.

transformers takes the length of the longest sequence for all: in a packed pass, of whatever row is
the longest. Here each row gets the factors that it has alone.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from types import MethodType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from lightning_grpo._compat import window_in_mask
from lightning_grpo.algorithm.batch import to_device, token_positions
from lightning_grpo.algorithm.layers import ScoreForm, bent_attention, causal_mask
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.sequence_parallel import RowShare

try:  # Prototype in torch, seen in 2.11 to 2.13; without it the padded form serves.
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn

    _OPTIONS = frozenset(inspect.signature(_varlen_attn).parameters)
except ImportError:  # pragma: no cover - depends on the torch installed
    _varlen_attn = None  # type: ignore[assignment]
    _OPTIONS = frozenset()


def has_packed_kernel(query: Tensor) -> bool:
    """Whether the kernel exists and takes this tensor: CUDA, half precision."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return _varlen_attn is not None and query.is_cuda and half


def packed_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within each sequence; all `[tokens, heads, head_dim]`.

    Args:
        query: `[tokens, heads, head_dim]`.
        key: `[tokens, key heads, head_dim]`.
        value: As `key`.
        cu_seqlens: int32 `[sequences + 1]`.
        max_length: Tokens of the longest sequence.
        scale: Of the scores; None is 1 / sqrt(head_dim).
        window: Tokens that one can see, itself included; None for all before it.
    """
    assert _varlen_attn is not None
    options: dict[str, Any] = {"scale": scale}
    options["window_size"] = (-1 if window is None else window - 1, 0)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in _OPTIONS:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = _varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_length, max_length, **options)
    assert isinstance(out, Tensor)
    return out


LONG = 16384
"""Tokens of a sequence from which on cuDNN's kernel computes it, alone: on an H200 it takes 0.6 of
the time of torch's own, but 0.05 s to plan for each new length, which shorter ones don't regain."""
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _kernels(length: int) -> AbstractContextManager[None]:
    """The kernels that torch may use: left alone it takes cuDNN's, and plans for every length."""
    first = [SDPBackend.CUDNN_ATTENTION] * (length >= LONG)
    return sdpa_kernel([*first, *_KERNELS], set_priority=True)


PACKED = "packed"
"""The name under which transformers knows the implementation."""

_MAX_STRETCH = 1.3
"""Longest over shortest sequence that are padded together."""


class NotPackedError(ValueError):
    """Attention was called in another way than `PackedPolicy` does.

    Args:
        reason: What the model does.
        rule: What it must do instead.
    """

    def __init__(self, reason: str, rule: str = "leave its attention to transformers") -> None:
        super().__init__(
            'attn_implementation="packed" needs the sequences\' bounds and no mask: call the model '
            'through PackedPolicy, or load it with attn_implementation="sdpa".'
        )
        self.reason, self.rule = reason, rule


@dataclass(frozen=True)
class LengthBucket:
    """Sequences that are padded together.

    Attributes:
        index: Which token stands where, int64 `[sequences * length]`; padding repeats a token.
        num_sequences: How many.
        length: Of the longest.
    """

    index: Tensor
    num_sequences: int
    length: int


class PackedLayout:
    """Where sequences start and end, and which tokens need computing, once per forward.

    Tokens that begin a sequence just as they began the one before (the prompt of a group) have
    the same hidden states, so the trunk runs on *unique* tokens only and attention reads shared
    ones from each sequence that they begin.

    Args:
        cu_seqlens: `[sequences + 1]`, on the device of the tokens.
        input_ids: int64 `[tokens]`; None shares nothing.
        bounds: The values of `cu_seqlens` where they are known; to read them off a GPU is to wait
            for it.
        experts: `[tokens, layers, top_k]` that tokens go through: those shared have the same; None:
            they follow from the tokens.

    Attributes:
        cu_seqlens: int32 `[sequences + 1]`.
        num_tokens: Of all sequences.
        starts: Where each sequence starts.
        lengths: Tokens of each sequence.
        max_length: Tokens of the longest sequence.
        has_long: Whether that is one which attention computes apart.
        unique: Positions of the unique tokens, int64 `[unique]`.
        unique_of: Which unique token each token is, int64 `[tokens]`.
        repeats: Positions of the tokens that are not among the unique ones, int64.
        positions: Of each unique token within its sequences, int64 `[unique]`.
        attended: How often attention was computed by it, where nothing is compiled.
        share: This rank's part of the unique tokens, where several compute them together.
    """

    share: RowShare | None = None

    def __init__(
        self,
        cu_seqlens: Tensor,
        input_ids: Tensor | None = None,
        bounds: Sequence[int] | None = None,
        experts: Tensor | None = None,
    ) -> None:
        self.cu_seqlens = cu_seqlens.to(torch.int32)
        bounds = cu_seqlens.tolist() if bounds is None else bounds
        self.num_tokens = bounds[-1]
        self.starts = bounds[:-1]
        self.lengths = [end - start for start, end in pairwise(bounds)]
        self.max_length = max(self.lengths, default=0)
        self.has_long = self.max_length >= LONG
        if len(self.lengths) == 1:  # in few steps: a proof waits for them
            self.unique = torch.arange(self.num_tokens, device=cu_seqlens.device)
            self.unique_of = self.positions = self.unique
            self.repeats = self.unique[:0]
        else:
            positions = token_positions(cu_seqlens)
            source = tokens = torch.arange(len(positions), device=cu_seqlens.device)
            if input_ids is not None:
                source = shared_prefixes(input_ids, cu_seqlens, experts)
            self.unique, self.unique_of = torch.unique(source, return_inverse=True)
            self.positions = positions[self.unique]
            self.repeats = (self.unique[self.unique_of] != tokens).nonzero().squeeze(1)
        self._padded: tuple[list[LengthBucket], Tensor] | None = None
        self.attended = 0

    @classmethod
    def of_one(cls, num_tokens: int, device: torch.device) -> Self:
        """The layout of a single sequence, without a wait for the device."""
        bounds = [0, num_tokens]
        return cls(torch.tensor(bounds).to(device, non_blocking=True), bounds=bounds)

    def to(self, device: torch.device) -> Self:
        """The same layout for tokens on a device."""
        if self.cu_seqlens.device == device:
            return self
        moved = copy.copy(self)
        for name in ("cu_seqlens", "unique", "unique_of", "positions", "repeats"):
            setattr(moved, name, to_device(getattr(self, name), device))
        return moved

    @property
    def num_sequences(self) -> int:
        """How many."""
        return len(self.lengths)

    def own(self, values: Tensor, filling: int = 0) -> Tensor:
        """Of values of unique tokens, `[unique, ...]`, those that this rank computes."""
        return values if self.share is None else self.share.own(values, filling)

    @property
    def num_own(self) -> int:
        """How many unique tokens this rank computes."""
        return len(self.unique) if self.share is None else self.share.num_own

    def tokens_of(self, rows: Sequence[int]) -> Tensor:
        """Positions of the tokens of some sequences, int64; where nothing is shared."""
        spans = [range(self.starts[i], self.starts[i] + self.lengths[i]) for i in rows]
        return torch.tensor([*chain(*spans)], device=self.cu_seqlens.device)

    def padded(self) -> tuple[list[LengthBucket], Tensor]:
        """Buckets of unique tokens, and for each unique token its row in them laid end to end."""
        if self._padded is None:
            self._padded = self._build()
        return self._padded

    def _build(self) -> tuple[list[LengthBucket], Tensor]:
        unique_of = self.unique_of.cpu()
        buckets, rows = [], torch.zeros(len(self.unique), dtype=torch.int64)
        offset = 0
        for members in _similar(self.lengths):
            length = max(self.lengths[i] for i in members)
            starts = torch.tensor([self.starts[i] for i in members]).unsqueeze(1)
            lengths = torch.tensor([self.lengths[i] for i in members]).unsqueeze(1)
            steps = torch.arange(length).unsqueeze(0)
            index = unique_of[starts + torch.minimum(steps, lengths - 1)]
            real = steps < lengths
            rows[index[real]] = offset + torch.arange(index.numel()).view_as(index)[real]
            device = self.cu_seqlens.device
            buckets.append(LengthBucket(index.flatten().to(device), len(members), length))
            offset += index.numel()
        return buckets, rows.to(self.cu_seqlens.device)


def predicted_positions(layout: PackedLayout, positions_mask: Tensor | None = None) -> Tensor:
    """Positions t whose token is predicted from t - 1: the one place that knows the shift.

    The first token of a sequence has nothing before it and is never among them; nor is one whose
    t - 1 another rank computes. int64.
    """
    num_tokens, device = layout.num_tokens, layout.cu_seqlens.device
    if layout.num_sequences == 1 and positions_mask is None:
        found = torch.arange(1, max(1, num_tokens), device=device)
    else:
        wanted = torch.ones(num_tokens, dtype=torch.bool, device=device)
        if positions_mask is not None:
            wanted &= positions_mask
        starts = layout.cu_seqlens[:-1].long()
        wanted[starts[starts < num_tokens]] = False
        found = wanted.nonzero().squeeze(1)
    if layout.share is None:
        return found
    return found[layout.share.holds(layout.unique_of[found - 1])]


def shared_prefixes(input_ids: Tensor, cu_seqlens: Tensor, experts: Tensor | None = None) -> Tensor:
    """For each token the first one with the same past, among sequences that stand in a row.

    Token p of sequence i stands for token p of sequence i - 1 if both begin with the same p + 1
    tokens (and go through the same experts), and so on backward. int64 `[tokens]`.
    """
    lengths, starts = cu_seqlens.diff(), cu_seqlens[:-1].long()
    positions = token_positions(cu_seqlens)
    tokens = torch.arange(len(positions), device=positions.device)
    before = torch.cat([starts[:1], starts[:-1]])
    known = torch.cat([lengths.new_zeros(1), lengths[:-1]])
    twin = (torch.repeat_interleave(before, lengths) + positions).clamp_max(len(tokens) - 1)
    differs = (input_ids != input_ids[twin]) | (
        positions >= torch.repeat_interleave(known, lengths)
    )
    if experts is not None:
        differs |= (experts != experts[twin]).flatten(1).any(1)
    # Differences so far in this sequence: the running count minus what it was before its start.
    count = differs.long().cumsum(0)
    before_start = torch.cat([count.new_zeros(1), count])[starts]
    at_start = torch.repeat_interleave(before_start, lengths)
    twin = torch.where(count == at_start, twin, tokens)
    return _roots(twin)


def _roots(parent: Tensor) -> Tensor:
    """Follows each chain to its end; a chain's length halves with every round."""
    while True:
        grandparent = parent[parent]
        if torch.equal(grandparent, parent):
            return parent
        parent = grandparent


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    buckets: list[list[int]] = []
    for i in sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: -lengths[i]):
        if buckets and lengths[buckets[-1][0]] <= _MAX_STRETCH * lengths[i]:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    return [sorted(bucket) for bucket in buckets]


def register_packed_attention() -> str:
    """Make the packed attention known to transformers, and return its name there.

    No mask function is registered: then transformers builds no mask.
    """
    AttentionInterface.register(PACKED, packed_attention_forward)
    return PACKED


def packed_attention_forward(  # noqa: PLR0913 - the signature that transformers calls
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: PackedLayout | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The form that transformers calls: `[1, heads, unique, head_dim]` in.

    Dropout is ignored: a ratio of two policies has no room for it.

    Returns:
        `[1, unique, heads, head_dim]`, and no attention weights.
    """
    if packing is None:
        raise NotPackedError("doesn't pass on to it where sequences begin")
    if attention_mask is not None:
        raise NotPackedError("gives it a mask of its own")
    if more.get("position_bias") is not None:
        raise ConfigError(
            f"`model` must have no biases of positions in its attention, {type(module).__name__} "
            "has a `position_bias`. Way out: a model without it, such as Qwen3 or Llama."
        )
    form, share = ScoreForm.of(more), packing.share
    compiling = torch.compiler.is_compiling()
    window = sliding_window or window_in_mask(module)
    # The kernel knows neither caps nor sinks: on GPUs, too, they take the padded form, which is
    # slower and needs memory of length squared.
    takes_kernel = form is None and has_packed_kernel(query)
    apart = packing.has_long and window is None
    if compiling and (share is not None or apart or not takes_kernel):
        given = (module, query, key, value, attention_mask, scaling, sliding_window, packing)
        return _unseen(*given, **more)
    if not compiling:  # as a branch: torch 2.11 can't compile the sum of a number and a bool
        packing.attended += 1
    if share is None:
        return _attend(query, key, value, packing, scaling, window, form), None
    query, key, value = share.by_heads(query, key, value)
    out = _attend(query, key, value, packing, scaling, window, share.form(form))
    return share.by_tokens(out), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: PackedLayout,
    scale: float | None,
    window: int | None,
    form: ScoreForm | None,
) -> Tensor:
    """All `[1, heads, unique, head_dim]`; gives `[1, unique, heads, head_dim]`."""
    takes_kernel = form is None and has_packed_kernel(query)
    # The compiler must not even look at the number: it would compile for each again.
    alone = not torch.compiler.is_compiling() and packing.num_sequences == 1
    # Only the kernel knows a window without a mask of length squared.
    if alone and not (takes_kernel and window is not None):
        return causal_attention(query, key, value, scale, window, form).transpose(1, 2)
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    if takes_kernel:
        out = varlen_attention(query, key, value, packing, scale, window)
    else:
        out = padded_attention(query, key, value, packing, scale, window, form)
    return out.unsqueeze(0)


# The work of the padded form depends on where sequences begin, which is no reason to compile again.
_unseen = torch.compiler.disable(packed_attention_forward)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: PackedLayout,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each sequence by torch's kernels; as `padded_attention`."""
    query, key, value = (spread(t, packing) for t in (query, key, value))
    if packing.has_long and window is None:
        out = _in_turn(query, key, value, packing, scale)
    else:
        bounds, longest = packing.cu_seqlens, packing.max_length
        out = packed_kernel(query, key, value, bounds, longest, scale, window)
    return pick(out, packing)


def _in_turn(
    query: Tensor, key: Tensor, value: Tensor, packing: PackedLayout, scale: float | None
) -> Tensor:
    """Long sequences one by one, and those between them together."""
    outs = []
    for rows in turns(packing.lengths):
        lengths, bounds = packing.lengths[rows], packing.cu_seqlens[rows.start : rows.stop + 1]
        tokens = slice(packing.starts[rows.start], packing.starts[rows.start] + sum(lengths))
        part = (query[tokens], key[tokens], value[tokens])
        if lengths[0] < LONG:
            bounds = bounds - bounds[0]
            outs.append(packed_kernel(*part, bounds, max(lengths), scale, None))
        else:
            q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in part)
            outs.append(causal_attention(q, k, v, scale, None).squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def turns(lengths: Sequence[int]) -> list[slice]:
    """Which sequences attention computes together: each long one alone, others with neighbors."""
    found: list[slice] = []
    for is_long, group in groupby(range(len(lengths)), lambda row: lengths[row] >= LONG):
        rows = list(group)
        found += [slice(r, r + 1) for r in rows] if is_long else [slice(rows[0], rows[-1] + 1)]
    return [rows for rows in found if any(lengths[rows])]


def spread(values: Tensor, packing: PackedLayout) -> Tensor:
    """Values of unique tokens, `[unique, ...]`, to all tokens, `[tokens, ...]`."""
    if len(packing.repeats) == 0:
        return values
    sharing = (packing.unique, packing.unique_of, packing.repeats)
    return cast("Tensor", _Spread.apply(values, *sharing))


def pick(values: Tensor, packing: PackedLayout) -> Tensor:
    """Values of all tokens, `[tokens, ...]`, to those of unique ones, `[unique, ...]`."""
    if len(packing.repeats) == 0:
        return values
    return cast("Tensor", _Pick.apply(values, packing.unique))


class _Spread(torch.autograd.Function):
    """Values of unique tokens to all tokens.

    As `index_select` does it, whose backward adds every row by atomic operations, in bf16 by far
    the slowest of a step's small kernels: here only what is really a repetition is added.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, unique: Tensor, unique_of: Tensor, repeats: Tensor
    ) -> Tensor:
        ctx.save_for_backward(unique, unique_of, repeats)
        return values.index_select(0, unique_of)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        unique, unique_of, repeats = ctx.saved_tensors
        summed, again = grad.index_select(0, unique), grad.index_select(0, repeats)
        return summed.index_add_(0, unique_of[repeats], again), None, None, None


class _Pick(torch.autograd.Function):
    """Values of all tokens to those of unique ones; what repeats has no use."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, unique: Tensor) -> Tensor:
        ctx.save_for_backward(unique)
        ctx.num_tokens = len(values)
        return values.index_select(0, unique)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (unique,) = ctx.saved_tensors
        spread = grad.new_zeros(ctx.num_tokens, *grad.shape[1:])
        return spread.index_copy_(0, unique, grad), None


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: PackedLayout,
    scale: float | None = None,
    window: int | None = None,
    form: ScoreForm | None = None,
) -> Tensor:
    """Causal attention within each sequence by way of padding; all `[unique, heads, head_dim]`."""
    buckets, rows = packing.padded()
    outs = [_bucket_attention(query, key, value, b, scale, window, form) for b in buckets]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(0, rows)


def _bucket_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bucket: LengthBucket,
    scale: float | None,
    window: int | None,
    form: ScoreForm | None,
) -> Tensor:
    def pad(tokens: Tensor) -> Tensor:
        rows = tokens.index_select(0, bucket.index)
        return rows.view(bucket.num_sequences, bucket.length, *tokens.shape[1:]).transpose(1, 2)

    out = causal_attention(pad(query), pad(key), pad(value), scale, window, form)
    return out.transpose(1, 2).flatten(0, 1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    form: ScoreForm | None = None,
) -> Tensor:
    """Causal attention within each row, all `[sequences, heads, length, head_dim]`.

    Keys and values may have fewer heads; each then serves as many of the query's.
    """
    length, mask = query.shape[2], None
    if form is not None:
        visible = causal_mask(length, window, query.device)
        return bent_attention(query, key, value, visible, scale, form)
    if window is not None and length > window:
        mask = causal_mask(length, window, query.device)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not query.is_cuda:  # kernels of GPUs do it by themselves
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    compiling = torch.compiler.is_compiling()
    with _kernels(length) if query.is_cuda and not compiling else nullcontext():
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=groups > 1 and query.is_cuda,
        )


logger = logging.getLogger(__name__)


def size_of(config: Any, name: str) -> Any:
    """A size by its name, None where there is none; of most layers where some have their own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # so says transformers that layers differ in it
        return config.to_dict().get(name)


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
        kinds = [str(rope["rope_type"]) for rope, _ in ropes]
        self._rotaries: list[Any] = [m for m in model.modules() if _is_of(m, kinds)]
        for rotary in self._rotaries:
            rotary.groups = rotary.row = None
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
            rotary.groups, rotary.row = tokens, None if layout.share is None else layout
        try:
            yield
        finally:
            for rotary in self._rotaries:
                rotary.groups = rotary.row = None

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

    if self.row is not None:  # a slice does not tell how long its sequences are
        row, self.row = self.row, None
        whole = self.forward(x, row.positions.unsqueeze(0), *args, **kwargs)
        self.row = row
        tensors = (whole,) if isinstance(whole, Tensor) else whole
        parts = [row.own(each[0]).unsqueeze(0) for each in tensors]
        return parts[0] if isinstance(whole, Tensor) else tuple(parts)
    dynamic = "dynamic" in str(self.rope_type)
    if self.groups is None:
        return own(position_ids)
    parts = [own(position_ids[..., index]) for index in self.groups]
    order = torch.cat(list(self.groups)).argsort()
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)[:, order]
    return tuple(torch.cat(part, 1)[:, order] for part in zip(*parts, strict=True))


def _is_of(module: nn.Module, kinds: Sequence[str]) -> bool:
    """Whether a module makes factors of one of these kinds, perhaps among others."""
    own = str(vars(module).get("rope_type", ""))
    return any(kind in own for kind in kinds)


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
    if kind == "longrope" or (kind != "default" and "long_mscale" in rope):
        return int(_original_length(text, rope))
    return int(text.max_position_embeddings) if "dynamic" in kind else None
