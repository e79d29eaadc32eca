import pytest
from transformers import AutoConfig, Qwen2Config

from lightning_grpo.policy.check import model_size, training_bytes

GIB = 1 << 30
SHAPE = Qwen2Config(
    hidden_size=1536,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def size():
    return model_size(SHAPE)


def test_a_models_size_is_read_off_its_config(size):
    assert size.parameters == 1_543_714_304
    assert size.kv_bytes_per_token == 28 * 2 * 2 * 128 * 2


def test_a_cache_of_another_form_is_not_guessed():
    assert model_size(AutoConfig.for_model("deepseek_v3")) is None


# Peaks that torch reported on an H200 (benchmarks/h200), which leave out the copy that is sent and
# what is CUDA's own.
@pytest.mark.parametrize(
    ("tokens", "checkpointing", "measured"), [(8192, False, 49), (16384, True, 28)]
)
def test_the_estimate_is_above_what_was_measured_and_not_by_much(
    size, tokens, checkpointing, measured
):
    beside = (size.parameters * 2 + 2 * GIB) / GIB
    estimate = training_bytes(size, tokens, checkpointing=checkpointing) / GIB
    assert measured + beside - 1 < estimate < 1.2 * (measured + beside)


def test_shards_adapters_and_offloading_take_less(size):
    whole = training_bytes(size, 8192)
    assert training_bytes(size, 8192, ranks=8) < whole
    assert training_bytes(size, 8192, ranks=8, sharded=False) > whole
    assert training_bytes(size, 8192, trained_fraction=0.02) < whole
    assert training_bytes(size, 8192, offloaded=True) < training_bytes(size, 8192, ranks=8)
