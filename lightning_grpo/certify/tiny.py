"""A tiny model of a config's kind, with every kind of layer; and rows that show how it computes.

Sizes shrink; kinds of layers, RoPE, windows, biases, tying and caps stay. Windows, chunks and the
lengths at which RoPE switches shrink so far that rows of 30 to 60 tokens lie on both sides, and
caps so far that they bend the small scores and logits of a tiny model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import length_switches

VOCAB = 61
CONTEXT = 128
WINDOW = 16
ORIGINAL_CONTEXT = 32
"""Length beyond which RoPE switches, or to which it was first trained."""
_HEADS, _HEAD_DIM, _ROTARY = 4, 16, 8
_HIDDEN_OF_HEADS, _HIDDEN_OF_ITS_OWN = _HEADS * _HEAD_DIM, 40
_SPREAD, _BIAS_SPREAD = 0.15, 0.1
_MOST_PARAMETERS = 3_000_000

_FIXED: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **{"hidden_size_per_layer_input": 8, "laurel_rank": 6},
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 36),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"), 20),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 28
    ),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size"), 44),
    **{"kv_lora_rank": 14, "q_lora_rank": 12, "qk_rope_head_dim": _ROTARY, "qk_nope_head_dim": 10},
    **{"qk_head_dim": 18, "v_head_dim": 12},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 6, "linear_value_head_dim": 10},
    **{"linear_num_heads": 4, "linear_head_dim": 12},
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 6),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "mamba_dt_rank": 3,
}
"""All different, so that none is taken for another; experts' must be multiples of 16 bytes."""
_NEEDED: dict[str, int] = {
    **{"num_experts_per_tok": 6, "n_routed_experts": 64, "n_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1},
}
"""Of mixtures: what some of transformers' own configs leave open."""
_AT_MOST: dict[str, int] = {
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step"), 2),
    **dict.fromkeys(("moe_layer_interval", "expert_layer_period", "attn_layer_period"), 2),
    **{"zero_expert_num": 2, "mamba_n_groups": 2, "n_groups": 2, "mamba_ngroups": 2},
    **{"n_group": 2, "topk_group": 1, "num_expert_group": 2, "num_limited_groups": 1},
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WINDOWS = ("sliding_window", "attention_chunk_size", "floor_scale", "window_size")
_CAPS = {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 1.5}
_LAYER_INDICES = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs"),
    *("attn_layer_indices", "hybrid_layer_ids"),
)
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
_LAST_LAYERS = ("num_kv_shared_layers",)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NOT_SETTINGS = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


def tiny_config(config: Any) -> Any:
    """The same kind of model at a ten-thousandth of its size.

    Args:
        config: Of a causal language model of transformers; it is left as it is.
    """
    names = _Names(config)
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_SETTINGS}
    layers = _chosen_layers(values, names.get("num_hidden_layers"))
    own = dict(values.get("per_layer_config") or {})
    values |= _of_layers(values, layers, names)
    before = dict(values)
    values |= _of_heads(config, names)
    values |= {k: size for k, size in _FIXED.items() if _counts(values.get(k))}
    values |= {
        k: [size] * len(values[k])  # a size of each layer's own
        for k, size in _FIXED.items()
        if _is_list(values.get(k)) and all(map(_counts, values[k]))
    }
    values |= {k: min(values[k], most) for k, most in _AT_MOST.items() if _counts(values.get(k))}
    grouped = any(values.get(name, 1) not in (None, 1) for name in ("n_group", "num_expert_group"))
    experts = 8 if grouped else 5
    values |= {k: min(values[k], experts) for k in _EXPERTS if _counts(values.get(k))}
    values |= _of_states(values, names)
    values |= _of_lengths(config, values, names)
    values |= {k: min(values[k], cap) for k, cap in _CAPS.items() if values.get(k)}
    values |= _of_ids(values)
    if own:
        values["per_layer_config"] = _of_each_layer(own, layers, before, values)
    tiny = type(config)(**values)
    tiny.architectures = config.architectures
    return tiny


def completed(config: Any) -> Any:
    """A config with the sizes that some of transformers' own leave open, and checkpoints set.

    Args:
        config: Of transformers, as its class makes it; it is left as it is.
    """
    names = _Names(config)
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_SETTINGS}
    heads, hidden = names.get("num_attention_heads"), names.get("hidden_size")
    sizes: dict[str, int] = {}
    if _counts(heads) and _counts(hidden):
        sizes = {"head_dim": hidden // heads, names.own("num_key_value_heads"): heads}
    if values.get("num_experts_per_tok", 1) is None:
        sizes |= _NEEDED
    missing = {k: size for k, size in sizes.items() if k in values and values[k] is None}
    return type(config)(**{**values, **missing}) if missing else config


def tiny_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in evaluation mode; no weight and no bias is 0.

    Args:
        config: As `tiny_config` gives it; the model gets a copy.
        seed: Of its weights, which are the same in any dtype.
        dtype: Of its parameters. In fp64 experts are computed one by one: there is no such kernel.

    Raises:
        ConfigError: It is not tiny: a size of the config has a name that isn't known here.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    size = sum(p.numel() for p in shapes.parameters())
    if size > _MOST_PARAMETERS:
        raise ConfigError(
            f"a tiny {config.model_type} must have at most {_MOST_PARAMETERS:,} parameters, it has "
            f"{size:,}: its config names sizes that are not known here."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for tensor in (*model.parameters(), *_kept_biases(model)):
            if tensor.ndim > 1:
                tensor.data.normal_(0, _SPREAD)
            else:
                tensor.data.add_(torch.randn_like(tensor) * _BIAS_SPREAD)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    model.to(dtype)  # type: ignore[arg-type]
    return model.eval()


def _kept_biases(model: PreTrainedModel) -> list[torch.Tensor]:
    """Biases that are no parameters: what balances experts."""
    kept = model.state_dict()
    return [b for name, b in model.named_buffers() if name in kept and name.endswith("bias")]


class _Names:
    """What a config calls the sizes that all have (`n_embd` for `hidden_size`)."""

    def __init__(self, config: Any) -> None:
        self._config, self._map = config, dict(config.attribute_map)

    def own(self, name: str) -> str:
        return str(self._map.get(name, name))

    def get(self, name: str) -> Any:
        try:
            return getattr(self._config, name, None)
        except RuntimeError:  # a size that some layers have of their own
            return self._config.to_dict().get(self.own(name))


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: Any) -> bool:
    return value is None or _counts(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _chosen_layers(values: Mapping[str, Any], count: int) -> list[int]:
    """The first layer of each kind, and two at least."""
    lists = [
        v for k, v in values.items() if k not in _LAYER_INDICES and _is_list(v) and len(v) == count
    ]
    kinds: dict[str, int] = {}
    for layer in range(count):
        kind = [each[layer] for each in lists]
        kind += [layer in (values.get(name) or ()) for name in _LAYER_INDICES]
        kind.append(_own_of(values.get("per_layer_config"), layer))
        kind += [layer < (values.get(name) or 0) for name in _FIRST_LAYERS]
        kind += [layer >= count - (values.get(name) or 0) for name in _LAST_LAYERS]
        kinds.setdefault(repr(kind), layer)
    chosen = list(kinds.values())
    chosen += [  # layers that share their weights with others of their kind
        next(i for i in range(first + 1, count) if each[i] == each[first])
        for each in lists
        for first in kinds.values()
        if each[first] == "hybrid" and each.count("hybrid") > 1
    ]
    chosen = sorted(set(chosen))
    if len(chosen) == 1 < count:
        chosen.append(1)
    return sorted(chosen)


def _own_of(own: Mapping[Any, Any] | None, layer: int) -> Any:
    """What one layer has of its own, where a config says that by the layer's number."""
    return next((each for number, each in (own or {}).items() if int(number) == layer), None)


def _of_each_layer(
    own: Mapping[Any, Any],
    layers: Sequence[int],
    before: Mapping[str, Any],
    values: Mapping[str, Any],
) -> dict[int, dict[str, Any]]:
    """What layers have of their own, as much larger than what others have as it was."""
    made: dict[int, dict[str, Any]] = {}
    for new, old in enumerate(layers):
        each = dict(_own_of(own, old) or {})
        made[new] = {
            name: size * values[name] // before[name] if _counts(before.get(name)) else size
            for name, size in each.items()
        }
    return {new: each for new, each in made.items() if each}


def _of_layers(values: Mapping[str, Any], layers: Sequence[int], names: _Names) -> dict[str, Any]:
    count = names.get("num_hidden_layers")
    made: dict[str, Any] = {names.own("num_hidden_layers"): len(layers)}
    for name, value in values.items():
        if name in _LAYER_INDICES and _is_list(value):
            made[name] = [new for new, old in enumerate(layers) if old in value]
        elif _is_list(value) and len(value) == count:
            made[name] = [value[layer] for layer in layers]
        elif name in _FIRST_LAYERS and _counts(value):
            made[name] = sum(layer < value for layer in layers)
        elif name in _LAST_LAYERS and _counts(value):
            made[name] = sum(layer >= count - value for layer in layers)
    return made


def _of_heads(config: Any, names: _Names) -> dict[str, Any]:
    """Four heads, on as many key heads as the model has, on fewer, or on one."""
    heads, hidden = names.get("num_attention_heads"), names.get("hidden_size")
    key_heads, head_dim = names.get("num_key_value_heads"), names.get("head_dim")
    own_width = _counts(head_dim) and _counts(heads) and head_dim * heads != hidden
    latent = _counts(names.get("qk_rope_head_dim"))
    fewer = _counts(key_heads) and _counts(heads) and key_heads < heads
    sizes = {
        "hidden_size": _HIDDEN_OF_ITS_OWN if own_width else _HIDDEN_OF_HEADS,
        "num_attention_heads": _HEADS,
        "head_dim": _ROTARY if latent else _HEAD_DIM,
        "num_key_value_heads": (1 if key_heads == 1 else _HEADS // 2) if fewer else _HEADS,
    }
    settable = config.to_dict()
    made = {names.own(name): size for name, size in sizes.items()}
    return {k: size for k, size in made.items() if k in settable and _is_size(settable[k])}


def _of_states(values: Mapping[str, Any], names: _Names) -> dict[str, Any]:
    """Heads of state spaces, which together are as wide as their layer within."""
    expand = values.get("mamba_expand") or values.get("expand")
    if not _counts(expand):
        return {}
    hidden = values[names.own("hidden_size")]
    width = expand * hidden
    heads = ("mamba_d_head", "mamba_head_dim", "mamba_headdim")
    sizes = {**dict.fromkeys(heads, width // _HEADS), "mamba_d_ssm": width}
    if "state_size" in values:
        sizes |= {"num_heads": _HEADS, "head_dim": width // _HEADS, "state_size": 6}
    # Zamba's attention sees the embedding beside what came to it.
    sizes |= {"attention_hidden_size": 2 * hidden, "attention_head_dim": 2 * hidden // _HEADS}
    return {name: size for name, size in sizes.items() if values.get(name) is not None}


def _of_lengths(config: Any, values: Mapping[str, Any], names: _Names) -> dict[str, Any]:
    """Windows that were as long as the context still are; all others are short."""
    context = names.get("max_position_embeddings")
    made: dict[str, Any] = {}
    for name in _WINDOWS:
        window = values.get(name)
        if _counts(window):
            made[name] = CONTEXT if _counts(context) and window >= context else WINDOW
    ropes = copy.deepcopy(values.get("rope_parameters") or values.get("rope_scaling"))
    rotary = _ROTARY if _counts(values.get("qk_rope_head_dim")) else _HEAD_DIM
    dynamic = False
    for rope in _nested(ropes):
        dynamic |= "dynamic" in str(rope.get("rope_type"))
        _shrink_rope(rope, rotary, values)
    if ropes is not None:
        made["rope_parameters" if "rope_parameters" in values else "rope_scaling"] = ropes
    if _counts(values.get("original_max_position_embeddings")):
        made["original_max_position_embeddings"] = ORIGINAL_CONTEXT
    if _counts(context):
        made[names.own("max_position_embeddings")] = ORIGINAL_CONTEXT if dynamic else CONTEXT
    return made


def _nested(ropes: Any) -> list[dict[str, Any]]:
    if not isinstance(ropes, dict):
        return []
    return [each for each in ropes.values() if isinstance(each, dict)] or [ropes]


def _shrink_rope(rope: dict[str, Any], rotary: int, values: Mapping[str, Any]) -> None:
    partial = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    pairs = int(rotary * partial) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            factors = rope[name]
            rope[name] = [factors[i * len(factors) // pairs] for i in range(pairs)]
    if _counts(rope.get("original_max_position_embeddings")):
        rope["original_max_position_embeddings"] = ORIGINAL_CONTEXT


def _of_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens, within the small vocabulary."""
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name.endswith("_token_id") and value is not None:
            own = _SPECIAL.get(name, VOCAB - 1)
            made[name] = [own] if isinstance(value, list) else own
    return made


# -- rows of tokens, and what transformers says of each alone --------------------------------------

LENGTHS = (1, 2, 9, 23, 33, 47, 60)
"""On both sides of the windows, and of the lengths at which RoPE switches, of a tiny model."""
_GROUPS = ((21, (5, 14, 30)), (3, (2, 40)), (9, (0, 0, 6)))
"""Length of a prompt, and of what follows it in each row."""
_NUM_SPECIAL = 3
"""Ids below mean something: padding, begin, end."""


def rows_of(config: Any, seed: int = 0) -> list[Tensor]:
    """Random rows of very different lengths, int64 `[tokens]` each.

    Args:
        config: Of a tiny model; lengths at which it switches are there, and one more.
        seed: Of the tokens.
    """
    switches = [n + more for n in length_switches(config) for more in (0, 1)]
    ordered = sorted({*LENGTHS, *(n for n in switches if n <= max(LENGTHS))})
    mixed = [n for pair in zip(ordered, reversed(ordered), strict=True) for n in pair]
    generator = torch.Generator().manual_seed(seed)
    return [random_ids(n, generator) for n in mixed[: len(ordered)]]


def rows_with_prompts(seed: int = 0) -> list[Tensor]:
    """Groups of rows that begin alike: by more than a window, by little, by all of a row."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for prompt, rests in _GROUPS:
        shared = random_ids(prompt, generator)
        rows += [torch.cat([shared, random_ids(n, generator)]) for n in rests]
    return rows


def random_ids(length: int, generator: torch.Generator) -> Tensor:
    """Ids of no special meaning, int64 `[length]`."""
    return torch.randint(_NUM_SPECIAL, VOCAB, (length,), generator=generator)


def pack(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`input_ids [tokens]` and `cu_seqlens [rows + 1]`."""
    return torch.cat(list(rows)), torch.tensor([0, *map(len, rows)]).cumsum(0)


def plain_logprobs(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """What transformers' own forward gives each row alone, `[tokens]`, laid out as the policy's."""
    found: dict[int, Tensor] = {}
    # In rising length: RoPE that depends on it remembers the longest row that it has seen.
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        logits = model(rows[index].unsqueeze(0), use_cache=False).logits[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        taken = wide[:-1].gather(1, rows[index][1:].unsqueeze(1)).squeeze(1)
        found[index] = torch.cat([wide.new_zeros(1), taken])
    return torch.cat([found[index] for index in range(len(rows))])


@torch.no_grad()
def policy_logprobs(policy: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """What a policy gives the rows, packed, `[tokens]`."""
    logprobs: Tensor = policy(*pack(rows))[0]
    return logprobs


# -- two ways to compute the same ------------------------------------------------------------------

_SMALL = 1e-3
"""Of the whole gradient: a parameter with less of it (none, by symmetry) is held against that."""


def difference(left: Tensor, right: Tensor) -> float:
    """The largest of all elements; not a number where there is one."""
    return (left.double() - right.double()).abs().max().item()


def gradients_apart(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference over parameters, relative to its own gradient, and whose it is."""
    total = sum(g.square().sum().item() for g in theirs.values()) ** 0.5
    found = {
        name: ((mine[name] - g).norm() / max(g.norm().item(), _SMALL * total)).item()
        for name, g in theirs.items()
    }
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    return found[worst], worst


class AllInFp64(TorchFunctionMode):
    """Has fp64 stay fp64 where a model's own code asks for fp32: norms, softmax, shares of sinks.

    What two such roundings differ by grows from layer to layer beyond what a gradient may be off.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float and not args[0].is_floating_point():
            return args[0].double()  # positions, which older versions multiply with fp64
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if each is torch.float32 else each for each in args]
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
