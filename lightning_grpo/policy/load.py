"""Loading a policy and its tokenizer, by hub id or from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
        ConfigError: The folder or the hub id can't be loaded.
    """
    register_packed_attention()
    options: dict[str, Any] = {"attn_implementation": PACKED, **(model_kwargs or {})}
    check_source(model)
    try:
        policy = _meta(model, dtype, options) if meta else _load(model, dtype, options)
    except (OSError, ValueError, KeyError, TypeError) as error:
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
        tokenizer = AutoTokenizer.from_pretrained(model, **tokenizer_kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"`model` must come with a tokenizer, got {model!r}: {_first_line(error)} "
            "Way out: put tokenizer.json and tokenizer_config.json into the folder."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def check_source(model: str) -> None:
    """Raises ConfigError for a path to a folder that isn't there or holds no model."""
    path = Path(model).expanduser()
    looks_like_path = model.startswith((".", "~", "/")) or model.count("/") > 1
    if path.is_dir():
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


def _check_tokenizer_files(model: str) -> None:
    # transformers makes up a tokenizer without a vocabulary where a folder has none.
    folder = Path(model).expanduser()
    if folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        raise ConfigError(
            f"`model` must come with a tokenizer, got {model!r}, which has none. "
            "Way out: put tokenizer.json and tokenizer_config.json into the folder."
        )


def without_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0: two passes over a token must give the same logprob.

    The mode stays training, which gradient checkpointing asks for. (Packed attention has none.)
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keeps only the blocks' inputs for the backward pass; acts in training mode alone.

    transformers 5.2x renames `gradient_checkpointing_enable`; the old name warns there.
    """
    renamed = "activation_checkpointing_enable"
    name = renamed if hasattr(model, renamed) else "gradient_checkpointing_enable"
    enable = getattr(model, name)
    enable({"use_reentrant": False})


def _load(model: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    with without_bars():
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options)
    assert isinstance(policy, PreTrainedModel)
    return policy


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


def _meta(model: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    attention = options.pop("attn_implementation")
    config = AutoConfig.from_pretrained(model, **options)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    assert isinstance(policy, PreTrainedModel)
    return policy


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."
