"""Attention with soft caps and sinks; in fp64 `tests/unit/policy/test_attention.py` looks at it."""

import pytest
import torch

from lightning_grpo.algorithm.scores import ScoreForm, bent_attention, causal_mask


def test_a_window_sees_itself_and_what_is_less_than_it_before():
    assert causal_mask(4, None, torch.device("cpu")).int().tolist() == [
        *([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1])
    ]
    assert causal_mask(4, 2, torch.device("cpu")).int().tolist() == [
        *([1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1])
    ]


def test_attention_without_caps_and_sinks_has_no_form():
    assert ScoreForm.of({"softcap": None, "s_aux": None, "other": 1}) is None
    assert ScoreForm.of({}) is None
    assert ScoreForm.of({"softcap": 30.0}) == ScoreForm(30.0, None)


def test_a_large_sink_takes_all_attention_of_its_head_alone():
    ones = torch.ones(1, 2, 3, 4)
    visible = causal_mask(3, None, ones.device)
    form = ScoreForm(None, torch.tensor([100.0, -100.0]))
    out = bent_attention(ones, ones, ones, visible, None, form)
    assert torch.allclose(out[:, 0], torch.zeros(3, 4), atol=1e-6)
    assert torch.allclose(out[:, 1], torch.ones(3, 4), atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_in_bf16_only_the_result_is_rounded(softcap):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 40, 8, generator=generator).bfloat16() for heads in (4, 2, 2)
    )
    form = ScoreForm(softcap, torch.randn(4, generator=generator).bfloat16())
    visible = causal_mask(40, 16, query.device)
    found = bent_attention(query, key, value, visible, 1.0, form)
    exact = bent_attention(query.double(), key.double(), value.double(), visible, 1.0, form)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-5)
