"""A tiny random Qwen3 folder with a real byte-level tokenizer, for tests that need a model.

Made in well under a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3MoeForCausalLM

EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", EOS_TOKEN)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "Tom has 3 apples and buys 4 more apples. How many apples does Tom have now?",
    "Tom has 3 + 4 = <<3+4=7>>7 apples.\n#### 7",
    "Mia fills 5 boxes with 6 pens each. How many pens are there in the boxes?",
    "There are 5 * 6 = <<5*6=30>>30 pens.\n#### 30",
    "system user assistant What is the sum of the numbers?",
)


def make_tiny_tokenizer(max_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (every string round-trips) with a chat template.

    Args:
        max_size: Most entries, special tokens included; at least 259.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny_model(
    folder: str | Path,
    seed: int = 0,
    vocab: int = 512,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    tie_word_embeddings: bool = True,
    max_position_embeddings: int = 512,
    initializer_range: float = 0.08,
    num_experts: int = 0,
) -> Path:
    """Write a tiny random Qwen3 checkpoint and its tokenizer to `folder`, and return it.

    Args:
        folder: Where to write; made if missing.
        seed: Seed of the weights. The tokenizer is the same for every seed.
        vocab: Rows of the embedding (at least 259); the tokenizer has at most 320 entries.
        hidden_size: Width; there are 2 heads of 32 and one key-value head.
        num_layers: Decoder layers.
        tie_word_embeddings: Whether the head is the embedding.
        max_position_embeddings: The context length.
        initializer_range: Spread of the weights; large enough for distributions with a shape.
        num_experts: Of each layer, two of which each token sees; 0: a dense model.
    """
    folder = Path(folder)
    tokenizer = make_tiny_tokenizer(min(vocab, 320))
    kind, experts = Qwen3ForCausalLM, {}
    if num_experts:
        experts = {
            **{"num_experts": num_experts, "num_experts_per_tok": 2, "norm_topk_prob": True},
            "moe_intermediate_size": hidden_size,
        }
        kind = Qwen3MoeForCausalLM
    config = kind.config_class(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **experts,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
