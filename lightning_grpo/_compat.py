"""Every private name of transformers and torch that code without Lightning uses, in one place.

Seen with transformers 5.23 and torch 2.13.0. A new release of either is checked here first.
Apart from `_compat_lightning`, so that the embedded engine starts without importing Lightning.

| name | where | seen in |
|---|---|---|
| `_execution_engine.queue_callback` | torch.autograd.Variable | torch 2.13.0 |
| `_will_engine_execute_node` | torch._C | torch 2.13.0 |
| `ban_recompute_materialized_backward` | torch._functorch.config | torch 2.11, 2.13.0 |
| `master_listen_fd` | torch.distributed.TCPStore | torch 2.13.0 |
| `_no_split_modules` | transformers.PreTrainedModel | transformers 5.23 |
| `create_sliding_window_causal_mask` | modules of transformers.models | transformers 5.23 |
| `LinearAttentionCacheLayerMixin` | transformers.cache_utils | transformers 5.12, 5.17, 5.23 |
| `_can_set_attn_implementation` | transformers.PreTrainedModel | transformers 5.12, 5.23 |
| `get_model_conversion_mapping` | transformers.conversion_mapping | transformers 5.12, 5.23 |
| `_weight_conversions` | transformers.PreTrainedModel | transformers 5.12, 5.23 |
| `revert_weight_conversion` | transformers.core_model_loading | transformers 5.12, 5.23 |
"""

from __future__ import annotations

import copy
import gc
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_STATE_ALONE = frozenset({"linear_attention", "mamba", "conv"})
RECURRENT_KINDS = _STATE_ALONE | {"hybrid", "hybrid_sliding"}
"""What configs call layers that carry a state from token to token, some beside attention."""


_FROZEN_BY_PYTHON = gc.get_freeze_count()
"""Objects that 3.12 freezes as it starts; other versions none."""


def is_heap_frozen() -> bool:
    """Whether the program has frozen its heap, which to thaw would be to thaw for it, too."""
    return gc.get_freeze_count() > _FROZEN_BY_PYTHON


def freeze_heap() -> None:
    """Collect what is garbage by now, and have the collector leave the rest alone from here on.

    CPython looks at all objects once those that are new are a quarter of those that it saw last
    time, and goes on counting the frozen ones among these (seen in 3.11): half a million keep
    garbage of a hundred thousand objects. The second look, at nothing, has it begin anew.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


def after_backward(call: Callable[[], None]) -> None:
    """Have something called when the backward pass that runs now has ended; FSDP2 does so, too."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def will_accumulate(node: Any) -> bool:
    """Whether the backward pass that runs now ends in this leaf's `.grad`; `autograd.grad` doesn't.

    Args:
        node: The leaf's, as another node's `next_functions` have it.
    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # as it answers under `autograd.grad`
        return False


def compile_sparingly(graph: Any, inputs: Any) -> Any:
    """Compile for torch.compile as Inductor does, and keep less for the backward pass.

    What is cheap to compute from what is kept anyway is computed again, also where a product reads
    it: of a gated MLP the product of both branches, a quarter of what a block would keep.
    """
    import torch._functorch.config as partitioner  # here, not above: only who compiles needs them
    from torch._inductor import compile as by_inductor

    with partitioner.patch(ban_recompute_materialized_backward=False):
        return by_inductor(graph, inputs)


def no_split_modules(module: nn.Module) -> set[str]:
    """Class names of the decoder blocks that transformers declares, over all models inside."""
    return {name for m in module.modules() for name in vars(m).get("_no_split_modules") or ()}


def checkpoint_conversion(model: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """What makes the tensors that `save_pretrained` writes of a model's own; None: they are these.

    By the architecture alone. What `from_pretrained` leaves on a model (`_weight_conversions`) is
    what the files at hand needed: nothing, if they were in the layout of memory. Nor is the model
    itself asked for names, between which adapters and compilers put their own.

    Args:
        model: A `PreTrainedModel`.
    """
    # Here, not above: transformers takes seconds to import.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not get_model_conversion_mapping(model, add_legacy=False):
        return None
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    return partial(revert_weight_conversion, twin)


@contextmanager
def named_by_architecture(model: Any) -> Iterator[None]:
    """Have `save_pretrained` name tensors as `checkpoint_conversion` does.

    Args:
        model: A `PreTrainedModel`.
    """
    held = vars(model).pop("_weight_conversions", None)
    try:
        yield
    finally:
        if held is not None:
            model._weight_conversions = held


def window_in_mask(attention: nn.Module) -> int | None:
    """The sliding window of a layer of transformers, for those that only the mask says it to.

    Most layers pass it on to the attention function; a few (PhiMoE's) rely on the mask that a model
    makes, which own attention functions don't get.
    """
    config: Any = getattr(attention, "config", None)
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    source = sys.modules[type(attention).__module__]
    kinds, layer = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    is_full = kinds and layer is not None and kinds[layer] != "sliding_attention"
    return window if hasattr(source, "create_sliding_window_causal_mask") and not is_full else None


def lets_choose_attention(model: Any) -> bool:
    """Whether a model's attention goes through transformers' interface, as its source says.

    Args:
        model: A `PreTrainedModel`; of hybrids `_supports_attention_backend` says nothing.
    """
    return bool(model._can_set_attn_implementation())


def attending_layers(config: Any) -> list[int]:
    """The numbers of the layers that have attention, by a config of transformers.

    Args:
        config: Of text.
    """
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return list(range(config.num_hidden_layers))
    return [i for i, kind in enumerate(kinds) if kind not in _STATE_ALONE | {"mlp", "moe"}]


def layer_states(layer: Any) -> dict[tuple[str, int], Tensor]:
    """What a recurrent layer's cache holds: `conv_states` and `recurrent_states`, by number.

    transformers 5.12 has one of each, later versions any number.

    Args:
        layer: A `LinearAttentionCacheLayerMixin`.
    """
    found: dict[tuple[str, int], Tensor] = {}
    for kind in ("conv_states", "recurrent_states"):
        held = getattr(layer, kind)
        numbered = held if isinstance(held, dict) else {0: held}
        found |= {(kind, index): state for index, state in numbered.items() if state is not None}
    return found


def set_layer_states(layer: Any, kind: str, index: int, state: Tensor) -> None:
    """Have a recurrent layer's cache go on from a state, and write to it.

    Args:
        layer: A `LinearAttentionCacheLayerMixin`.
        kind: As `layer_states` names it.
        index: Its number.
        state: `[rows, ...]`.
    """
    values = {kind: state, f"is_{kind}_initialized": True, "has_previous_state": True}
    if kind == "conv_states":
        values["conv_kernel_size"] = state.shape[-1]
    for name, value in values.items():
        held = getattr(layer, name, None)
        if isinstance(held, dict):
            held[index] = value
        else:
            setattr(layer, name, value)
    layer.dtype, layer.device = state.dtype, state.device


def listen_at(host: str) -> tuple[int, int | None]:
    """Listen at one address of this machine, where torch's TCPStore alone listens at all of them.

    Args:
        host: An address, or the name of one.

    Returns:
        A free port and the file that listens there, for `TCPStore(host, port,
        master_listen_fd=file)`; (0, None) where `host` is none of this machine's addresses (it is
        reached through a translation), for which every address must do.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.bind(address)
            listening.listen(socket.SOMAXCONN)
            port: int = listening.getsockname()[1]
            return port, listening.detach()
    except OSError:
        return 0, None
