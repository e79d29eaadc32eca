"""A size to add up in the head, and the shape of Qwen2.5-1.5B."""

from transformers import Qwen2Config

from lightning_grpo.policy.size import ModelSize

ROUND = ModelSize(
    parameters=1000,
    embedding=200,
    layers=4,
    hidden=8,
    intermediate=32,
    query_width=16,
    kv_width=4,
    vocab=10,
)
QWEN_SHAPE = Qwen2Config(
    hidden_size=1536,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    tie_word_embeddings=True,
)
