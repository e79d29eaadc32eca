"""Layers that carry a state from token to token, in rows that hold several sequences.

Linear attention (the gated delta rule of Qwen3-Next and Qwen3.5), state spaces (Mamba) and short
causal convolutions read a row from left to right: what they remember of one sequence would reach
the next one. Here each sequence begins with an empty state and an empty window.

The layers stay transformers' own. On GPUs their kernels are told where sequences begin, where these
are installed (flash-linear-attention, causal-conv1d, mamba-ssm) and are found to heed it. Elsewhere
sequences of similar length are padded together, at the right, where causal layers never look.

A prompt that several sequences share is read once for each of them here, since each needs the state
at its end; everything else of the model computes its tokens once.
"""

from __future__ import annotations

import inspect
import logging
import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_grpo._compat import RECURRENT_KINDS, attending_layers
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import NotPackedError, PackedLayout, pick, size_of, spread

logger = logging.getLogger(__name__)

_WITHOUT_STATE = frozenset({"full_attention", "sliding_attention", "mlp", "moe"})
"""Kinds of layers whose tokens meet in the attention function only, or nowhere."""
_RULE = "have recurrent layers that can begin anew at each sequence of a packed row"
_TRIED = (70, 5)
"""Lengths of the rows on which kernels are tried: more than a chunk, and hardly a window."""
_TRIED_ROUNDING = 0.05
"""Of half precision, relative; a state that leaks makes a difference of order 1."""


def recurrent_parts(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that remember earlier tokens, in their order.

    By what transformers' have in common: they take their cache as `cache_params`, or hold a
    convolution over time.
    """
    found = [module for module in model.modules() if _remembers(module)]
    return [m for m in found if not any(o is not m and o in found for o in m.modules())]


def _remembers(module: nn.Module) -> bool:
    if any(isinstance(child, nn.Conv1d) for child in module.children()):
        return True
    return "cache_params" in inspect.signature(type(module).forward).parameters


def keep_sequences_apart(model: PreTrainedModel) -> None:
    """Have every recurrent layer begin each packed sequence anew, in place.

    Raises:
        ConfigError: The model has layers of which it is not known how.
    """
    name, kinds = type(model).__name__, list(getattr(model.config, "layer_types", None) or ())
    other = set(kinds) - _WITHOUT_STATE - RECURRENT_KINDS
    recurrent = [kind for kind in kinds if kind in RECURRENT_KINDS]
    parts = recurrent_parts(model)
    if other or len(parts) != len(recurrent):
        left = sorted(other) or sorted(set(recurrent))
        known = "" if other else f" ({len(recurrent)} layers, {len(parts)} that could)"
        raise ConfigError(
            "`model` must consist of attention layers, or of recurrent ones that can begin anew, "
            f"{name} has {left}{known}, which would run across the sequences of a packed row. "
            "Way out: a model without them, or a hybrid such as Qwen3-Next and Qwen3.5."
        )
    part: Any
    for part in parts:
        part.keeps_apart = None
        part.forward = MethodType(_forward, part)


def _forward(
    self: Any, hidden_states: Tensor, *args: Any, packing: PackedLayout | None = None, **kwargs: Any
) -> Tensor:
    if packing is None:
        raise NotPackedError("doesn't tell these layers where sequences begin", _RULE)
    if kwargs.get("attention_mask") is not None:
        raise NotPackedError("gives these layers a mask of its own", _RULE)
    if torch.compiler.is_compiling():
        return _unseen(self, hidden_states, packing, *args, **kwargs)
    return _by_sequence(self, hidden_states, packing, *args, **kwargs)


def _own(part: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out = type(part).forward(part, hidden_states, *args, **kwargs)
    if not isinstance(out, Tensor):
        raise NotPackedError(f"has one that gives a {type(out).__name__}", _RULE)
    return out


def _by_sequence(
    part: Any, hidden_states: Tensor, packing: PackedLayout, *args: Any, **kwargs: Any
) -> Tensor:
    # Tried at the first pass of all, a proof's: before anything is sampled.
    if (
        hidden_states.is_cuda
        and part.keeps_apart is None
        and not torch.cuda.is_current_stream_capturing()
    ):
        part.keeps_apart = heeds_bounds(part, hidden_states)
    if packing.num_sequences == 1:
        return _own(part, hidden_states, *args, **kwargs)
    if part.keeps_apart:
        rows = spread(hidden_states[0], packing).unsqueeze(0)
        bounds = _bounds(packing.cu_seqlens, packing.num_tokens)
        return pick(_own(part, rows, *args, **bounds, **kwargs)[0], packing).unsqueeze(0)
    buckets, rows = packing.padded()
    outs = []
    for bucket in buckets:
        padded = hidden_states[0].index_select(0, bucket.index)
        padded = padded.view(bucket.num_sequences, bucket.length, -1)
        outs.append(_own(part, padded, *args, **kwargs).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.index_select(0, rows).unsqueeze(0)


# What is done depends on where sequences begin, which is no reason to compile again.
_unseen = torch.compiler.disable(_by_sequence)


def _bounds(cu_seqlens: Tensor, num_tokens: int) -> dict[str, Tensor]:
    """Where sequences begin, under the names that transformers has for the kernels' arguments."""
    sequences = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=cu_seqlens.device)
    index = sequences.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    return {"cu_seq_lens_q": cu_seqlens, "seq_idx": index.unsqueeze(0)}


def heeds_bounds(part: nn.Module, like: Tensor) -> bool:
    """Whether a layer keeps sequences apart if it is told where they begin, found out by trying.

    Without the kernels transformers refuses bounds, and versions of it pass on not all of them.

    Args:
        part: A recurrent layer.
        like: What it gets, `[1, tokens, hidden]`.

    Raises:
        ConfigError: It has no gradient: flash-linear-attention refuses it where the compiler of its
            kernels is known to make wrong ones.
    """
    steps = torch.arange(sum(_TRIED) * like.shape[-1], device=like.device)
    rows = steps.sin().view(1, -1, like.shape[-1]).to(like.dtype)
    bounds = torch.tensor([0, *_TRIED], dtype=torch.int32, device=like.device).cumsum(0)
    told = _bounds(bounds.to(torch.int32), sum(_TRIED))
    with torch.no_grad():
        alone = torch.cat([_own(part, row) for row in rows.split(_TRIED, 1)], 1)
        try:
            packed = _own(part, rows, **told)
        except (ValueError, TypeError, RuntimeError) as error:
            logger.info("recurrent layers are computed in padded form: %s", error)
            told, packed = {}, alone
    # Of the second row: what the first leaves behind would be there.
    rest, expected = (each[:, _TRIED[0] :].float() for each in (packed, alone))
    heeds = bool((rest - expected).norm() <= _TRIED_ROUNDING * expected.norm())
    _require_gradient(part, rows, told if heeds else {})
    return bool(told) and heeds


def _require_gradient(part: nn.Module, rows: Tensor, told: dict[str, Tensor]) -> None:
    rows = rows.requires_grad_()
    try:
        with torch.enable_grad():
            torch.autograd.grad(_own(part, rows, **told).sum(), rows)
    except RuntimeError as error:
        reason = str(error).strip()
        raise ConfigError(
            "`model` must have recurrent layers whose kernels can be trained through, those of "
            f"{type(part).__name__} fail at it on this machine: {reason} Way out: do what "
            "that says, or uninstall the kernels: transformers' own form needs none, and is slower."
        ) from error


def attention_layers(config: Any) -> int:
    """How many layers have attention whose work grows with the square of the length."""
    return len(attending_layers(config.get_text_config()))


def state_numbers(config: Any) -> int:
    """Numbers of the states of all recurrent layers, which each token reads and writes."""
    text = config.get_text_config()
    layers = sum(k in RECURRENT_KINDS for k in getattr(text, "layer_types", None) or ())
    for names in _STATES:
        sizes = [size_of(text, name) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return layers * math.prod(sizes)
    return 0


_STATES = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
)
"""How configs call a state's heads and the two sides of each."""
STATE_FLOPS = 18
"""Operations for each number of a state: it is read, corrected and read again; backward has twice
that."""
