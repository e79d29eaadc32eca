"""How large a model is, and what training it takes of a GPU: estimates from the config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

HALF, FULL = 2, 4
"""Bytes of a number in bf16 and in fp32."""
ADAM_STATES = 2
ADAPTER_FRACTION = 0.02
"""Of the parameters, that an adapter of the usual rank trains."""
HIDDEN_KEPT, INTERMEDIATE_KEPT = 10, 4
"""Activations of a block that backward needs, in hidden and intermediate widths (measured on the
Qwen2.5-1.5B shape: 2.4 MiB a token without compilation)."""
HEAD_BYTES = 4 << 30
"""Logits of a chunk, their softmax and the head's gradient (`policy/head.py`)."""
CONTEXT_BYTES = 2 << 30
"""CUDA's own, kernels, workspaces and what the allocator can't use."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model's size counts.

    Attributes:
        parameters: How many.
        layers: Blocks.
        hidden: Width between blocks.
        intermediate: Width within a block's MLP, as far as one token passes it.
        kv_width: Keys and values of one token in one layer, in numbers.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int

    @property
    def kv_bytes_per_token(self) -> int:
        """What a server keeps of each token, in bf16."""
        return self.layers * self.kv_width * HALF


def model_size(config: Any) -> ModelSize | None:
    """The size of a config's causal language model; None where its widths have other names."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if not (heads and hidden and layers) or hasattr(config, "kv_lora_rank"):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return ModelSize(
        sum(p.numel() for p in model.parameters()),
        layers,
        hidden,
        (intermediate or 4 * hidden) * experts,
        2 * kv_heads * head_dim,
    )


def training_bytes(
    size: ModelSize,
    tokens: int,
    *,
    ranks: int = 1,
    sharded: bool = True,
    checkpointing: bool = False,
    trained_fraction: float = 1.0,
    offloaded: bool = False,
) -> int:
    """Estimate what one rank takes of its GPU at the end of a micro-batch's forward pass.

    Args:
        size: Of the model.
        tokens: Of the largest micro-batch.
        ranks: Over which parameters, gradients and optimizer state are sharded.
        sharded: By `fsdp2`, which computes in bf16; otherwise all of it is on each rank, in fp32.
        checkpointing: Whether blocks keep their inputs only.
        trained_fraction: Of the parameters; an adapter trains a hundredth.
        offloaded: Whether parameters, gradients and optimizer state are in host memory.
    """
    shards = ranks if sharded else 1
    trained = FULL * (1 + ADAM_STATES) * trained_fraction  # gradients and Adam's two moments
    states = 0 if offloaded else size.parameters * (FULL + trained) / shards
    copies = size.parameters * HALF * (2 if sharded else 1)  # in bf16: to compute with, and to send
    compute = HALF if sharded else FULL
    block = HIDDEN_KEPT * size.hidden + INTERMEDIATE_KEPT * size.intermediate
    kept = size.hidden if checkpointing else block
    activations = tokens * compute * (size.layers * kept + (block if checkpointing else 0))
    return int(states + copies + activations + HEAD_BYTES + CONTEXT_BYTES)
