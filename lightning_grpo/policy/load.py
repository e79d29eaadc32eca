"""Loading a policy and its tokenizer, by hub id or from a folder."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import PACKED, register_packed_attention

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")
_OLD_BUFFERS = re.compile(r"(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)$")
"""Buffers that older versions of transformers wrote and that follow from the config."""
_NOISE = re.compile(r"dropout|pdrop|layerdrop|drop_path|jitter")

_OTHER_THAN_TEXT = ("vision", "audio", "vq")

_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, EOFError),
    *(SafetensorError, pickle.UnpicklingError),
)
"""What transformers raises for folders, hub ids and options that it can't make a model of."""


def load_policy(
    model: str,
    *,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model with packed attention and without dropout, in training mode.

    Args:
        model: Hub id or folder.
        dtype: Of the parameters.
        meta: Only the shapes, on the meta device; `materialize_from_folder` brings the values.
        model_kwargs: For transformers' `from_pretrained` (`revision`, `attn_implementation`, ...).

    Raises:
        ConfigError: The folder or the hub id can't be loaded, or lacks weights.
    """
    register_packed_attention()
    # Said, since transformers would otherwise ask at the terminal whether to run a folder's code.
    options: dict[str, Any] = {
        "attn_implementation": PACKED,
        "trust_remote_code": False,
        **(model_kwargs or {}),
    }
    check_source(model)
    try:
        check_config(_read_config(model, options), model, options)
        policy = _meta(model, dtype, options) if meta else _load(model, dtype, options)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, KeyError) and error.args == (PACKED,):
            raise ConfigError(
                f"`model` must let transformers choose its attention, {model!r} has a fixed list "
                "of its own. Way out: a newer architecture, such as Qwen3 or Llama."
            ) from error
        raise ConfigError(
            f"`model` must be a causal language model that transformers loads, got {model!r}: "
            f"{_first_line(error)} Way out: a hub id, or a folder with config.json and weights."
        ) from error
    without_dropout(policy)
    policy.config.use_cache = False
    policy.train()
    return policy


def load_tokenizer(model: str, **tokenizer_kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder.

    Raises:
        ConfigError: There is none.
    """
    check_source(model)
    _check_tokenizer_files(model)
    try:
        options = {"trust_remote_code": False, **tokenizer_kwargs}
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"`model` must come with a tokenizer, got {model!r}: {_first_line(error)} "
            "Way out: put tokenizer.json and tokenizer_config.json into the folder."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def check_source(model: str) -> None:
    """Raise ConfigError for a path to a folder that isn't there or holds no model of its own."""
    path = Path(model).expanduser()
    looks_like_path = model.startswith((".", "~", "/")) or model.count("/") > 1
    if path.is_dir():
        adapted = (path / "adapter_config.json").is_file()
        if adapted:
            raise ConfigError(
                f"`model` must be a whole model, got {model!r}, which holds an adapter "
                "(adapter_config.json): servers would not load it. Way out: merge it into the "
                "weights (PEFT's `merge_and_unload`), or move it to a folder of its own."
            )
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"`model` must be a folder with config.json, got {model!r}, which has none. "
                "Way out: a folder as `save_pretrained` writes it."
            )
    elif looks_like_path:
        raise ConfigError(
            f"`model` must be a folder that exists, got {model!r}. "
            "Way out: check the path, or give a hub id such as Qwen/Qwen3-0.6B."
        )


def check_config(config: Any, model: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse models whose weights can't be trained here, by what their config says of them.

    Args:
        config: Of transformers.
        model: Where it is from.
        options: For `from_pretrained`.

    Raises:
        ConfigError: The weights are quantized, or the model takes more than text.
    """
    quantized = (options or {}).get("quantization_config") or getattr(
        config, "quantization_config", None
    )
    if quantized:
        said = quantized if isinstance(quantized, Mapping) else vars(quantized)
        raise ConfigError(
            f"`model` must have weights that can be trained, those of {model!r} are quantized "
            f"({said.get('quant_method', 'unknown method')}). Way out: the model that they were "
            "made from; with `lora` on a GPU that is too small, fewer layers or a smaller model."
        )
    parts = [part.removesuffix("_config") for part in getattr(config, "sub_configs", None) or ()]
    if any(part.startswith(_OTHER_THAN_TEXT) or part == "text" for part in parts):
        raise ConfigError(
            f"`model` must be a language model alone, {model!r} ({config.model_type}) consists of "
            f"parts: {', '.join(sorted(parts))}. Way out: save its text part as a model of its own "
            '(docs/troubleshooting.md, "A model that also sees") and give that folder.'
        )


def _check_tokenizer_files(model: str) -> None:
    # transformers makes up a tokenizer without a vocabulary where a folder has none.
    folder = Path(model).expanduser()
    if folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        raise ConfigError(
            f"`model` must come with a tokenizer, got {model!r}, which has none. "
            "Way out: put tokenizer.json and tokenizer_config.json into the folder."
        )


def without_dropout(model: nn.Module) -> None:
    """Set every dropout layer to 0: two passes over a token must give the same logprob."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def compute_as_served(model: PreTrainedModel) -> None:
    """Leave training mode, in which models add noise that servers don't have.

    Dropout, jitter and sampled routes, wherever a model keeps them, ask for training mode. So does
    gradient checkpointing, of the blocks alone: they stay in it, with their own noise set to 0.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in list(vars(module).items()):
                if _NOISE.search(name) and isinstance(value, float):
                    setattr(module, name, 0.0)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the blocks' inputs for the backward pass; acts in training mode alone.

    transformers 5.2x renames `gradient_checkpointing_enable`; the old name warns there.
    """
    renamed = "activation_checkpointing_enable"
    name = renamed if hasattr(model, renamed) else "gradient_checkpointing_enable"
    enable = getattr(model, name)
    enable({"use_reentrant": False})


def _load(model: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    reports = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, **{**options, **reports}
        )
    policy: PreTrainedModel = loaded[0]
    _check_weights(policy, loaded[1], model)
    return policy


def _check_weights(policy: PreTrainedModel, info: Mapping[str, Any], model: str) -> None:
    """Refuse what transformers would fill with random numbers or leave out, with a warning."""
    if getattr(policy, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"`model` must be a whole model, got {model!r}, which comes with an adapter. Way out: "
            "merge it into the weights (PEFT's `merge_and_unload`) and give that folder."
        )
    wrong = {
        "lacks": sorted(info["missing_keys"]),
        "has in another shape": sorted(
            f"{name} ({_shape(found)}, by the config {_shape(wanted)})"
            for name, found, wanted in info["mismatched_keys"]
        ),
        "has beside the layers of the config": _left_out(policy, info["unexpected_keys"]),
    }
    said = [f"{problem} {_some(names)}" for problem, names in wrong.items() if names]
    if said:
        raise ConfigError(
            f"`model` must hold the weights that its config.json describes, {model!r} "
            f"{'; it '.join(said)}. Way out: a complete checkpoint of this architecture, "
            "or the config.json that belongs to these weights."
        )
    head, embedding = policy.get_output_embeddings(), policy.get_input_embeddings()
    tied = getattr(policy.config, "tie_word_embeddings", False) and isinstance(head, nn.Linear)
    if tied and head.weight is not embedding.weight:
        raise ConfigError(
            "`model` must have one weight for embedding and head (`tie_word_embeddings` in "
            f"config.json), {model!r} holds two that differ. Way out: set `tie_word_embeddings` to "
            "false there."
        )


def _left_out(policy: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Weights of the language model itself; a value head, say, does no harm."""
    trunk = policy.base_model
    head = next((n for n, m in policy.named_modules() if m is policy.get_output_embeddings()), "")
    parts = (name for name, _ in trunk.named_children())
    ours = {policy.base_model_prefix, head.partition(".")[0], *parts}
    names = (name for name in unexpected if not _OLD_BUFFERS.search(name))
    return sorted(name for name in names if name.partition(".")[0] in ours)


def _some(names: list[str], most: int = 3) -> str:
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


@contextmanager
def without_bars() -> Iterator[None]:
    """Reading and writing are quick or happen on every rank: a bar for each says nothing."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _read_config(model: str, options: Mapping[str, Any]) -> Any:
    kwargs = {k: v for k, v in options.items() if k not in ("attn_implementation", "config")}
    return AutoConfig.from_pretrained(model, **kwargs)


def _meta(model: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    config = _read_config(model, options)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=options["attn_implementation"]
        )
    assert isinstance(policy, PreTrainedModel)
    return policy


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."
