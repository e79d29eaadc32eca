"""Every planted fault is caught by the line that looks for it; the package's own parts are not."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import CONFIG_MAPPING

from lightning_grpo.certify import checks
from lightning_grpo.certify.checks import CHECKS, Parts, measured
from lightning_grpo.certify.run import run_check
from lightning_grpo.certify.tiny import tiny_config
from tests.fakes import faulty_parts as faulty

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [1.0 + i / 8 for i in range(48)]}
LONG = {
    "original_max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS},
}


def tiny(kind, **settings):
    return tiny_config(CONFIG_MAPPING[kind](**settings))


MODELS = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "qwen3 with dynamic RoPE": ("qwen3", {"rope_parameters": DYNAMIC}),
    "phi3 with longrope": ("phi3", LONG),
    "gemma3 with windows": ("gemma3_text", {}),
    "mistral with a window": ("mistral", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "olmo3 with windows": ("olmo3", {"sliding_window": 1024}),
    "phimoe, whose masks alone have a window": ("phimoe", {"sliding_window": 1024}),
    "cohere2 with windows and scaled logits": ("cohere2", {}),
    "granite with scaled logits": ("granite", {"logits_scaling": 8.0}),
    "nanochat with capped logits": ("nanochat", {}),
    "gemma2 with windows and caps": ("gemma2", {}),
    "gpt_oss with windows and sinks": ("gpt_oss", {}),
    "mixtral": ("mixtral", {}),
    "gpt_neox with a head of another name": ("gpt_neox", {}),
    "glm4_moe with a bias that balances experts": ("glm4_moe", {}),
    "qwen3_next with states and experts": ("qwen3_next", {}),
    "qwen3_5 with states": ("qwen3_5_text", {}),
    "qwen3_5_moe with states and experts": ("qwen3_5_moe_text", {}),
    "falcon_h1 with Mamba-2 beside attention": ("falcon_h1", {}),
    "nemotron_h with Mamba-2, attention and experts in layers of their own": ("nemotron_h", {}),
    "lfm3 with short convolutions": ("lfm3", {}),
}


ALONE = [check for check in CHECKS if check is not checks.ranks]


@pytest.mark.parametrize("model", MODELS)
def test_the_package_s_own_path_is_right(model):
    kind, settings = MODELS[model]
    config = tiny(kind, **settings)
    found = [run_check(check, config, Parts()) for check in ALONE]
    assert {line.verdict for line in found} <= {"ok", "skipped"}, found
    assert [line.check for line in found] == [check.__name__ for check in ALONE]


SHARED = {
    **{name: MODELS[name] for name in ("qwen2", "gpt_oss with windows and sinks", "mixtral")},
    "gemma3, whose embedding has a buffer": ("gemma3_text", {}),
    "falcon_h1, whose recurrent layers have one": ("falcon_h1", {}),
    "deepseek_v3 with latent attention": ("deepseek_v3", {}),
    "qwen3_next with states and experts": ("qwen3_next", {}),
    "nemotron_h": ("nemotron_h", {}),
    "zamba, whose blocks share parameters": ("zamba", {"num_hidden_layers": 14}),
    "zamba2, whose blocks lie in one another": ("zamba2", {}),
}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("model", SHARED)
def test_a_step_of_two_ranks_is_that_of_one(model):
    kind, settings = SHARED[model]
    line = run_check(checks.ranks, tiny(kind, **settings), Parts())
    assert line.verdict == "ok", line
    assert line.figure < 1e-9  # no rounding but that of fp64


RANKS = [
    ("qwen2", {"policy": faulty.SumsOverRanks}, r"the gradient of .* under ddp"),
    ("qwen2", {"strategy": faulty.leaves_one_out}, "the gradient of model.model.norm.weight under"),
    ("mixtral", {"strategy": faulty.mixes_up_experts}, r"the gradient of .*experts.* under fsdp2"),
    ("qwen3", {"publish": faulty.with_one_rank_s_shard_twice}, "what servers get of .* under fsdp"),
]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "parts", "said"), RANKS)
def test_what_ranks_get_wrong_is_caught_by_their_line(kind, parts, said):
    line = run_check(checks.ranks, tiny(kind), Parts(**parts))
    assert (line.check, line.verdict) == ("ranks", "WRONG")
    assert re.search(f"most in {said}", line.found), line.found
    assert line.figure > 0.01


POLICIES = [
    (checks.packed, "qwen2", {}, faulty.SeesTheNextRow),
    (checks.packed, "qwen2", {}, faulty.without_biases),
    (checks.packed, "qwen3", {"rope_parameters": DYNAMIC}, faulty.OneFactorForAllRows),
    (checks.packed, "phi3", LONG, faulty.OneFactorForAllRows),
    (checks.packed, "gemma3_text", {}, faulty.OneWindowTooMany),
    (checks.packed, "nanochat", {}, faulty.LeavesOutTheCap),
    (checks.packed, "cohere", {}, faulty.LeavesOutTheCap),
    (checks.packed, "granite", {"logits_scaling": 8.0}, faulty.MultipliesWhatItShouldDivide),
    (checks.gradient, "nanochat", {}, faulty.NoCapInTheGradient),
    (checks.packed, "gemma2", {}, faulty.NoSoftcap),
    (checks.packed, "gpt_oss", {}, faulty.SinksOfOtherHeads),
    (checks.gradient, "gpt_oss", {}, faulty.FrozenSinks),
    (checks.packed, "gpt_oss", {}, faulty.OneWindowTooMany),
    (checks.apart, "qwen2", {}, faulty.SeesTheNextRow),
    (checks.apart, "qwen3_next", {}, faulty.StatesLeak),
    (checks.apart, "qwen3_5_text", {}, faulty.WindowsLeak),
    (checks.packed, "qwen3_5_moe_text", {}, faulty.StatesLeak),
    (checks.prefixes, "qwen3", {}, faulty.SharesTooMuch),
    (checks.passes, "qwen3", {}, faulty.Noisy),
    (checks.gradient, "qwen3", {}, faulty.Detached),
    (checks.cuts, "qwen3", {}, faulty.AveragesRows),
    (checks.checkpoint, "qwen3_5_text", {}, faulty.KeepsSomethingElsewhere),
    (checks.flops, "qwen3", {}, faulty.CountsNothing),
]


@pytest.mark.parametrize(("check", "kind", "settings", "policy"), POLICIES)
def test_a_policy_with_a_fault_is_caught_by_its_line(check, kind, settings, policy):
    config = tiny(kind, **settings)
    line = run_check(check, config, Parts(policy=policy))
    assert line.verdict == "WRONG"
    assert "Error" not in line.found  # the fault itself, not what it broke
    assert line.figure is None or line.figure > line.limit
    assert run_check(check, config, Parts()).verdict == "ok"


PUBLISHERS = [
    ("qwen2", faulty.with_swapped_names, ""),
    ("mixtral", faulty.with_permuted_experts, ""),
    ("qwen3_moe", faulty.with_a_swapped_gate, ""),
    ("glm4_moe", faulty.without_buffers, "the old stays: model.layers.1.mlp.gate.e_score"),
    ("qwen2", faulty.without_a_bias, "the old stays: model.layers.1.self_attn.k_proj.bias"),
    ("qwen2", faulty.under_wrapped_names, "known to no model: module.lm_head.weight and"),
]


@pytest.mark.parametrize(("kind", "publish", "said"), PUBLISHERS)
def test_a_publisher_with_a_fault_is_caught_by_names(kind, publish, said):
    line = run_check(checks.names, tiny(kind), Parts(publish=publish))
    assert line.verdict == "WRONG"
    assert said in line.found
    assert bool(said) or line.figure > line.limit


def test_experts_that_are_published_in_one_tensor_are_named_beside_the_checkpoint_s():
    config = tiny("qwen3_moe")
    line = run_check(checks.names, config, Parts(publish=faulty.as_held_in_memory))
    assert line.verdict == "WRONG"
    assert line.figure <= line.limit  # transformers would load them
    assert "has model.layers.0.mlp.experts.0.down_proj.weight and 29 more" in line.found
    assert "get model.layers.0.mlp.experts.down_proj and 3 more" in line.found
    line = run_check(checks.engine, config, Parts(publish=faulty.as_held_in_memory))
    assert (line.check, line.verdict) == ("engine", "WRONG")
    assert "which holds it as 'model.layers.0.mlp.experts.0" in line.found


def test_an_engine_and_an_export_with_a_fault_are_caught():
    config = tiny("qwen3")
    line = run_check(checks.engine, config, Parts(engine=faulty.one_position_off))
    assert (line.check, line.verdict) == ("engine", "WRONG")
    line = run_check(checks.engine, config, Parts(publish=faulty.with_swapped_names))
    assert (line.check, line.verdict) == ("engine", "WRONG")
    line = run_check(checks.export, config, Parts(export=faulty.exports_another))
    assert (line.check, line.verdict) == ("export", "WRONG")


def test_an_adapter_that_is_not_merged_is_caught():
    pytest.importorskip("peft")

    def unmerged(policy):
        own = dict(policy.model.named_parameters())
        published = Parts().publish(policy)
        bases = {name: name.replace(".weight", ".base_layer.weight") for name in published}
        return {name: own.get(bases[name], value) for name, value in published.items()}

    line = run_check(checks.adapter, tiny("llama"), Parts(publish=unmerged))
    assert (line.check, line.verdict) == ("adapter", "WRONG")
    assert line.figure > line.limit


ENGINES = [
    ("gemma3_text", faulty.one_window_too_many),
    ("gemma3_text", faulty.windows_of_the_neighbors),
    ("gemma3_text", faulty.forgets_its_windows),
    ("gpt_oss", faulty.one_window_too_many),
    ("gpt_oss", faulty.reads_with_other_sinks),
    ("gemma2", faulty.no_softcaps),
    ("qwen3_next", faulty.forgets_states),
    ("qwen3_5_text", faulty.pads_what_it_reads),
    ("qwen3_5_text", faulty.states_of_the_neighbors),
]


@pytest.mark.parametrize(("kind", "engine"), ENGINES)
def test_an_engine_with_other_windows_caps_sinks_or_states_is_caught(kind, engine):
    line = run_check(checks.engine, tiny(kind), Parts(engine=engine))
    assert (line.check, line.verdict) == ("engine", "WRONG")
    assert line.figure > line.limit


def test_a_model_that_the_engine_does_not_run_is_no_failure_of_it():
    line = run_check(checks.engine, tiny("deepseek_v3"), Parts())
    assert line.verdict == "skipped"
    assert line.found.startswith("not served here: ")
    assert "multi-head latent attention" in line.found


def test_what_a_check_raises_is_its_line():
    def broken(config, parts):
        raise KeyError("layers.7")

    line = run_check(broken, None, Parts())
    assert (line.check, line.verdict, line.found) == ("broken", "WRONG", "KeyError: 'layers.7'")


def test_a_figure_that_is_no_number_is_wrong():
    assert measured("x", float("nan"), 1.0, "").verdict == "WRONG"
    assert measured("x", 1.0, 1.0, "").verdict == "ok"
    assert measured("x", float("inf"), float("inf"), "").verdict == "WRONG"
    assert torch.tensor(measured("x", 0.0, 0.0, "").figure) == 0
