"""Memory and operations of training, against sums by hand and against what autograd keeps."""

from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, Qwen2Config, Qwen2ForCausalLM

from lightning_grpo.certify.tiny import tiny_config, tiny_model
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.policy.size import (
    CONTEXT_BYTES,
    TrainingSetup,
    kept_numbers,
    model_size,
    training_flops,
    training_memory,
)
from tests.fakes.sizes import QWEN_SHAPE, ROUND


@pytest.fixture(scope="module")
def size():
    return model_size(QWEN_SHAPE)


def test_a_models_size_is_read_off_its_config(size):
    assert size.parameters == 1_543_714_304
    assert size.embedding == 151_936 * 1536
    assert size.kv_bytes_per_token == 28 * 2 * 2 * 128 * 2
    assert (size.query_width, size.vocab) == (1536, 151_936)


def test_a_head_of_its_own_counts_beside_the_embedding():
    config = Qwen2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)
    assert model_size(config).embedding == 2 * 100 * 64


def test_of_layers_that_differ_in_a_size_the_most_are_counted():
    config = tiny_config(CONFIG_MAPPING["gemma4_text"]())
    found = model_size(config)
    assert found is not None
    assert found.query_width == config.num_attention_heads * config.to_dict()["head_dim"]
    assert PackedPolicy(tiny_model(config)).flops([5], 4) > 0


def test_a_cache_of_another_form_is_not_guessed():
    assert model_size(AutoConfig.for_model("deepseek_v3")) is None


def test_the_parts_of_one_rank_add_up_as_by_hand():
    memory = training_memory(ROUND, TrainingSetup(max_tokens=100))
    block = 4 * 8 + 2 * 16 + 4 + 4 * 32
    assert kept_numbers(ROUND) == block == 196
    assert memory.weights == memory.gradients == 4 * 1000
    assert memory.optimizer == 8 * 1000
    assert memory.copies == 2 * 1000 + 2 * 1000
    assert memory.activations == 100 * 4 * 196 * 2
    assert memory.logits == 5 * 4 * 100 * 10
    assert memory.total == memory.allocated + CONTEXT_BYTES
    assert memory.allocated == 4000 + 4000 + 8000 + 4000 + 156_800 + 20_000


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        # Over four ranks; gradients are whole until the last micro-batch, of the bf16 copy there
        # are the root (200) and two blocks (of 200 each).
        (
            {"ranks": 4, "keeps": False},
            {"weights": 1000, "gradients": 4000, "optimizer": 2000, "copies": 2 * 600 + 2000},
        ),
        ({"ranks": 4, "shard_size": 2}, {"weights": 2000, "gradients": 4000, "optimizer": 4000}),
        ({"ranks": 4, "sharded": False, "half": False}, {"weights": 4000, "gradients": 8000}),
        ({"sharded": False, "half": False}, {"copies": 2000, "activations": 100 * 4 * 196 * 4}),
        ({"checkpointing": True}, {"activations": 100 * (4 * 8 + 196) * 2}),
        ({"compiled": True}, {"activations": 100 * 4 * (196 - 2 * (8 + 32)) * 2}),
        ({"trained_fraction": 0.02}, {"gradients": 80, "optimizer": 160, "weights": 4000}),
        ({"offloaded": True}, {"weights": 0, "optimizer": 0, "gradients": 4000}),
        ({"reference": "gpu", "ranks": 2}, {"reference": 2000}),
        ({"reference": "host"}, {"reference": 0}),
        (
            {"ranks": 4, "row_ranks": 4},
            {"activations": 25 * 4 * 196 * 2, "logits": 5 * 4 * 25 * 10, "weights": 1000},
        ),
    ],
)
def test_each_setting_changes_its_parts_alone(changed, parts):
    found = training_memory(ROUND, replace(TrainingSetup(max_tokens=100), **changed)).parts
    assert {name: found[name] for name in parts} == parts


def test_no_more_logits_are_held_than_a_chunk_has(size):
    memory = training_memory(size, TrainingSetup(max_tokens=1 << 20))
    assert memory.logits == 5 * 4 * 2**28


def test_operations_are_those_that_a_run_counts():
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=100,
    )
    with torch.device("meta"):
        policy = PackedPolicy(Qwen2ForCausalLM(config))
    lengths, predicted = [7, 12], 15
    by_hand = sum(training_flops(model_size(config), lengths, predicted))
    assert by_hand == policy.flops(lengths, predicted)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "falcon_h1", "bamba"])
def test_operations_of_a_hybrid_are_those_that_a_run_counts_too(kind):
    config = tiny_config(CONFIG_MAPPING[kind]())
    policy = PackedPolicy(tiny_model(config))
    found = model_size(config)
    assert sum(training_flops(found, [7, 12], 15)) == policy.flops([7, 12], 15)
    assert found.states > 0


def test_a_server_keeps_keys_and_values_of_layers_with_attention_alone():
    config = tiny_config(CONFIG_MAPPING["qwen3_5_text"]())
    assert config.layer_types == ["linear_attention", "full_attention"]
    found = model_size(config)
    assert found.kv_bytes_per_token == 2 * found.kv_width


def test_autograd_keeps_of_a_block_what_the_formula_says():
    """Counted in bf16 by storage; what torch keeps on a CPU alone (norms step by step, masks, the
    expanded keys of its attention) is why it may be a fifth more, and never less."""
    config = Qwen2Config(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=1024,
        vocab_size=100,
    )
    policy = PackedPolicy(Qwen2ForCausalLM(config).to(torch.bfloat16))
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def kept(layers, tokens=256):
        held = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        policy.model.model.layers = full[:layers]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logprobs, _ = policy(torch.arange(tokens) % 100)
        logprobs.sum().backward()
        return sum(size for size, _ in held.values()) / tokens

    full = policy.model.model.layers
    block = (kept(2) - kept(1)) / 2
    expected = kept_numbers(model_size(config))
    assert expected <= block <= 1.3 * expected
