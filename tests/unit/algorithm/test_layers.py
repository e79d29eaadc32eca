"""Routers: the choice that is put in the place of theirs; attention scores that are bent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_grpo.algorithm.layers import (
    RouteRecorder,
    ScoreForm,
    bent_attention,
    causal_mask,
    routers_of,
)
from lightning_grpo.errors import ConfigError
from lightning_grpo.types import RouterShape, Routes
from tests.fakes.causal_models import make_causal_model, make_model_of
from tests.fakes.mixtures import (
    FORMULAS,
    MIXTURES,
    SETTINGS,
    make_mixture,
    replaying,
    routers,
)


@pytest.mark.parametrize("kind", MIXTURES)
def test_weights_of_given_experts_are_those_of_the_architecture_s_own_formula(kind):
    model = make_mixture(kind)
    (router, *_) = routers(model)
    hidden = torch.randn(9, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    _, weights, own = router(hidden)
    formula = FORMULAS[kind]
    assert torch.allclose(formula(router, hidden, own), weights, atol=1e-6)
    other = torch.stack([torch.randperm(8)[: own.shape[1]] for _ in hidden])
    with replaying(other):
        _, given, experts = router(hidden)
    assert torch.equal(experts, other)
    assert torch.allclose(formula(router, hidden, other), given, atol=1e-6)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_shape_of_the_routers_is_found_without_values(kind):
    with torch.device("meta"):
        model = make_mixture(kind)
    found = routers_of(model)
    dense = 1 if kind.startswith("deepseek") else 0
    assert found.shape == RouterShape(layers=3, top_k=2, experts=8)
    assert list(found.by_layer) == list(range(dense, 3))


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_model_as_wide_and_with_as_many_experts_as_real_ones_is_taken(kind):
    (name,) = SETTINGS[kind].keys() & {"num_experts", "num_local_experts", "n_routed_experts"}
    with torch.device("meta"):
        model = make_mixture(kind, hidden_size=4096, num_experts_per_tok=8, **{name: 256})
    assert routers_of(model).shape == RouterShape(layers=3, top_k=8, experts=256)


def test_a_recorder_tells_what_each_layer_chose_and_nothing_of_layers_without_experts():
    model = make_mixture("deepseek_v3")
    recorder = RouteRecorder(routers_of(model))
    heard = [[] for _ in routers(model)]
    for list_, router in zip(heard, routers(model), strict=True):
        router.register_forward_hook(lambda _, __, output, list_=list_: list_.append(output[2]))
    model(input_ids=torch.arange(10).view(2, 5), use_cache=False)
    experts = recorder.take()
    assert experts.shape == (10, 3, 2)
    assert not experts[:, 0].any()
    for index, (chosen,) in enumerate(heard, start=1):
        assert torch.equal(experts[:, index], chosen.int())


REFUSED = {
    "a dense model": (make_causal_model, "needs a mixture of experts"),
    "a router without topk": (lambda: make_model_of("phimoe"), "PhimoeTopKRouter"),
    "a choice within groups that weighs all others 0": (
        lambda: make_mixture("deepseek_v2", topk_method="group_limited_greedy", n_group=4),
        "DeepseekV2TopkRouter",
    ),
    "routes that are looked up by the token": (
        lambda: make_model_of("deepseek_v4", num_hash_layers=1),
        "DeepseekV4.*Router",
    ),
    "layers that are no blocks": (lambda: make_model_of("jetmoe"), "JetMoeForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_told_its_experts_is_refused_by_name(case):
    make, words = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"`router_replay` .*{words}.*Leave `router_replay` out"):
        routers_of(make())


def test_routers_of_different_sizes_are_refused():
    model = make_mixture("qwen3_moe")
    router = routers(model)[1]
    router.top_k = 3
    with pytest.raises(ConfigError, match="all of the same size"):
        routers_of(model)


def test_a_router_that_returns_something_else_is_refused():
    class OddRouter(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden)

    model = make_mixture("qwen3_moe")
    model.model.layers[2].mlp.gate = OddRouter(32, 8)
    with pytest.raises(ConfigError, match="OddRouter of Qwen3MoeForCausalLM"):
        routers_of(model)


def test_routes_are_joined_by_position_and_the_first_known_stay():
    shape = RouterShape(layers=1, top_k=2, experts=8)
    first, second = Routes(bytes([1, 2, 3, 4]), shape), Routes(bytes([5] * 8), shape)
    assert len(first) == 2
    assert first.then(second) == Routes(bytes([1, 2, 3, 4, 5, 5, 5, 5]), shape)
    assert second.then(first) == second
    assert first.then(second).first(3) == Routes(bytes([1, 2, 3, 4, 5, 5]), shape)


def test_numbers_of_experts_take_a_byte_where_one_is_left_for_none():
    assert [RouterShape(1, 1, experts).width for experts in (8, 255, 256, 512)] == [1, 1, 2, 2]


# -- attention with soft caps and sinks; in fp64 `tests/unit/policy/test_attention.py` looks at it


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
