"""Rows on both sides of everything that depends on length, and transformers' word on them."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING

from lightning_grpo.certify.rows import pack, plain_logprobs, rows_of, rows_with_prompts
from lightning_grpo.certify.tiny import tiny_config, tiny_model
from lightning_grpo.policy.attention import length_switches
from tests.fakes.causal_models import make_model_of
from tests.fakes.causal_models import plain_logprobs as trusted_logprobs


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
