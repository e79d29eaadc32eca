"""A tiny model keeps everything that changes what is computed, but for its size."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from lightning_grpo.certify.tiny import (
    CONTEXT,
    ORIGINAL_CONTEXT,
    WINDOW,
    completed,
    pack,
    plain_logprobs,
    rows_of,
    rows_with_prompts,
    tiny_config,
    tiny_model,
)
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import length_switches
from tests.fakes.causal_models import make_model_of
from tests.fakes.causal_models import plain_logprobs as trusted_logprobs


def config_of(kind, **settings):
    return CONFIG_MAPPING[kind](**settings)


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("gemma3_text", ["sliding_attention", "full_attention"]),
        ("exaone4", ["sliding_attention", "full_attention"]),
        ("qwen3", ["full_attention", "full_attention"]),
    ],
)
def test_every_kind_of_layer_is_there_once_and_two_layers_at_least(kind, kinds):
    settings = {"sliding_window": 4096, "sliding_window_pattern": 4} if kind == "exaone4" else {}
    assert tiny_config(config_of(kind, **settings)).layer_types == kinds


def test_of_a_mixture_there_is_a_dense_layer_and_one_of_experts():
    model = tiny_model(tiny_config(config_of("deepseek_v3")))
    experts = [any("experts" in n for n, _ in m.named_parameters()) for m in model.model.layers]
    assert experts == [False, True]
    named = config_of("qwen3_moe", mlp_only_layers=[0, 3])
    assert tiny_config(named).mlp_only_layers == [0]


def test_layers_without_rope_stay_so():
    tiny = tiny_config(config_of("smollm3"))
    assert sorted(tiny.no_rope_layers) == [0, 1]
    assert tiny.num_hidden_layers == 2


@pytest.mark.parametrize(("key_heads", "kept"), [(32, 4), (8, 2), (1, 1)])
def test_queries_share_keys_as_they_did(key_heads, kept):
    tiny = tiny_config(config_of("llama", num_attention_heads=32, num_key_value_heads=key_heads))
    assert (tiny.num_attention_heads, tiny.num_key_value_heads) == (4, kept)


def test_a_head_s_width_of_its_own_stays_one():
    wide = tiny_config(config_of("qwen3", hidden_size=1024, num_attention_heads=16, head_dim=128))
    assert wide.head_dim * wide.num_attention_heads != wide.hidden_size
    plain = tiny_config(config_of("llama"))
    assert plain.head_dim * plain.num_attention_heads == plain.hidden_size


@pytest.mark.parametrize(("window", "kept"), [(4096, WINDOW), (32768, CONTEXT), (None, None)])
def test_a_window_is_short_unless_it_was_as_long_as_the_context(window, kept):
    config = config_of("mistral", sliding_window=window, max_position_embeddings=32768)
    assert tiny_config(config).sliding_window == kept


def test_rope_that_switches_does_so_within_the_rows():
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]}
    long = config_of(
        "phi3",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    tiny = tiny_config(long)
    assert length_switches(tiny) == (ORIGINAL_CONTEXT,)
    assert tiny.rope_parameters["long_factor"] == [1.0 + 6 * i for i in range(8)]
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny = tiny_config(config_of("qwen3", rope_parameters=dynamic))
    assert length_switches(tiny) == (ORIGINAL_CONTEXT,)
    assert tiny.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gemma2", ("query_pre_attn_scalar",)),
        ("granite", ("embedding_multiplier", "attention_multiplier", "residual_multiplier")),
        ("qwen2", ("tie_word_embeddings", "rms_norm_eps", "hidden_act", "use_sliding_window")),
        ("deepseek_v3", ("routed_scaling_factor", "norm_topk_prob", "rope_interleave")),
    ],
)
def test_what_is_no_size_stays_as_it_is(kind, names):
    config = config_of(kind)
    before = config.to_dict()
    tiny = tiny_config(config)
    assert {n: getattr(tiny, n) for n in names} == {n: getattr(config, n) for n in names}
    assert config.to_dict() == before


def test_layers_that_share_the_keys_of_others_are_among_the_chosen():
    config = config_of("gemma3n_text")
    tiny = tiny_config(config)
    shared = tiny.num_kv_shared_layers
    assert 0 < shared < tiny.num_hidden_layers
    assert set(tiny.layer_types[-shared:]) == set(config.layer_types)
    assert set(tiny.layer_types[:-shared]) == set(config.layer_types)
    assert len(set(tiny.intermediate_size)) == 1


def test_no_bias_and_no_weight_is_nothing_and_seeds_tell_models_apart():
    tiny = tiny_config(config_of("qwen2"))
    first, again, other = tiny_model(tiny), tiny_model(tiny), tiny_model(tiny, seed=1)
    values = first.state_dict()
    assert all(value.count_nonzero() == value.numel() for value in values.values())
    assert all(torch.equal(value, again.state_dict()[n]) for n, value in values.items())
    assert not any(torch.equal(value, other.state_dict()[n]) for n, value in values.items())
    exact = tiny_model(tiny, dtype=torch.float64).state_dict()
    assert all(torch.equal(value.double(), exact[n]) for n, value in values.items())


def test_sizes_that_a_config_leaves_open_are_what_checkpoints_have():
    config = completed(config_of("nemotron"))
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    given = config_of("llama", num_key_value_heads=8)
    assert completed(given) is given


def test_layers_with_a_size_of_their_own_keep_one_as_much_larger():
    tiny = tiny_config(config_of("gemma4_text"))
    assert tiny.layer_types == ["sliding_attention", "full_attention"]
    heads = [layer.self_attn.head_dim for layer in tiny_model(tiny).model.layers]
    assert heads == [16, 32]


def test_a_model_whose_sizes_have_other_names_is_not_made():
    with pytest.raises(ConfigError, match="sizes that are not known here"):
        tiny_model(tiny_config(config_of("bart")))


# -- rows on both sides of everything that depends on length, and transformers' word on them -------


def test_rows_end_at_each_switch_one_behind_it_and_far_from_it():
    config = tiny_config(CONFIG_MAPPING["gemma3_text"]())
    lengths = [len(row) for row in rows_of(config)]
    for switch in length_switches(config):
        assert {switch, switch + 1} <= set(lengths)
        assert min(lengths) < switch / 2 < 2 * switch < max(lengths)
    assert lengths != sorted(lengths)
    assert len(set(lengths)) == len(lengths)


def test_groups_share_more_than_a_window_and_some_all_of_a_row():
    rows = rows_with_prompts()
    assert torch.equal(rows[0][:21], rows[2][:21])
    assert torch.equal(rows[5], rows[6])
    assert torch.equal(rows[7][: len(rows[6])], rows[6])
    assert not torch.equal(rows[2][:3], rows[3][:3])


def test_each_row_is_computed_alone_and_stands_where_it_was():
    model = make_model_of("qwen3")
    rows = rows_of(model.config)
    ids, bounds = pack(rows)
    found = plain_logprobs(model, rows)
    assert torch.equal(ids, torch.cat(rows))
    assert (found[bounds[:-1]] == 0).all()
    assert torch.allclose(found, trusted_logprobs(model, rows)[0])


def test_rope_that_remembers_the_longest_row_does_not_show():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = tiny_config(CONFIG_MAPPING["qwen3"](rope_parameters=dynamic))
    rows = rows_of(config)
    alone = torch.cat([plain_logprobs(tiny_model(config), [row]) for row in rows])
    assert torch.equal(plain_logprobs(tiny_model(config), rows), alone)
