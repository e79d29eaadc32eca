"""Small random causal language models of the architectures that the package names."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = ("qwen2", "qwen3", "llama")
_CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
VOCAB = 61


def make_causal_model(
    architecture: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0, **config: object
) -> PreTrainedModel:
    """Two layers, two heads on one key head; weights spread so that distributions have a shape."""
    config_class, model_class = _CLASSES[architecture]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
        **({} if architecture == "qwen2" else {"head_dim": 16}),
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**settings))
    return model.to(dtype)


def make_sequences(lengths: Sequence[int], seed: int = 0, shared: int = 0) -> list[Tensor]:
    """Random token ids; pairs of sequences begin with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    for left, right in zip(rows[::2], rows[1::2], strict=False):
        n = min(shared, len(left), len(right))
        right[:n] = left[:n]
    return rows


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`input_ids` and `cu_seqlens`."""
    return torch.cat(list(sequences)), torch.tensor([0, *map(len, sequences)]).cumsum(0)


def plain_logprobs(
    model: PreTrainedModel, sequences: Sequence[Tensor], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What transformers' own forward gives, one sequence at a time: logprobs and entropies."""
    logprobs, entropies = [], []
    for tokens in sequences:
        logits = model(tokens.unsqueeze(0), use_cache=False).logits[0]
        log_softmax = torch.log_softmax(
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1
        )
        first = log_softmax.new_zeros(1)
        taken = log_softmax[:-1].gather(1, tokens[1:].unsqueeze(1)).squeeze(1)
        logprobs.append(torch.cat([first, taken]))
        entropies.append(torch.cat([first, -(log_softmax.exp() * log_softmax).sum(-1)[:-1]]))
    return torch.cat(logprobs), torch.cat(entropies)


_SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"max_position_embeddings": 128, "word_embed_proj_dim": 32, "ffn_dim": 48},
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    **{"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 12, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 6, "linear_value_head_dim": 10},
    **{"tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def make_model_of(kind: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Two layers of any architecture that transformers has, by its `model_type`."""
    config_class = CONFIG_MAPPING[kind]
    known = {
        name for base in config_class.__mro__ for name in vars(base).get("__annotations__", ())
    }
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config_class(**{**sizes, **copy.deepcopy(settings)}), dtype=torch.float32
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:  # so that distributions have a shape
                parameter.data.normal_(0, 0.15)
    return model.eval()
