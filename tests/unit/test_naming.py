"""What travels has the names, layouts and values of what `save_pretrained` writes."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_grpo.errors import ConfigError
from lightning_grpo.naming import CheckpointNames, UnnamedWeightsError
from lightning_grpo.policy.load import without_bars
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.weights.gather import gather_weights, make_buckets, unpack
from tests.fakes.causal_models import make_model_of

SLICED = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_neox", "granitemoe"]


def written(model, folder, **options):
    with without_bars():
        model.save_pretrained(folder, **options)
    return load_file(folder / "model.safetensors")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("kind", [*SLICED, "hrm_text", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_layouts_and_values_are_those_that_save_pretrained_writes(kind, tied, tmp_path):
    model = make_model_of(kind, tie_word_embeddings=tied)
    sent = CheckpointNames(model).of(gather_weights(PackedPolicy(model)))
    assert equal(sent, written(model, tmp_path))


@pytest.mark.parametrize("kind", SLICED)
def test_what_is_sent_is_the_snapshot_s_own_memory_in_its_order(kind):
    model = make_model_of(kind)
    snapshot = gather_weights(model, torch.bfloat16)
    sent = CheckpointNames(model).of(snapshot)
    assert (sent.keys() == snapshot.keys()) <= (kind in ("gpt_neox", "granitemoe"))
    buckets = make_buckets({n: t for n, t in sent.items() if t.dtype == torch.bfloat16}, 1 << 30)
    first = next(iter(snapshot.values()))
    assert [bucket.flat.data_ptr() for bucket in buckets] == [first.data_ptr()]
    torch.testing.assert_close(dict(unpack(buckets[0])), {n: sent[n] for n in buckets[0].names})
    memory = {tensor.untyped_storage().data_ptr() for tensor in snapshot.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in sent.values()} == memory


def test_a_model_that_is_held_as_its_checkpoint_is_sent_as_it_is():
    model = make_model_of("qwen3")
    snapshot = gather_weights(model)
    assert CheckpointNames(model).of(snapshot) is snapshot


@pytest.mark.parametrize("kind", ["qwen3_moe", "hrm_text"])
def test_memory_that_is_written_again_is_named_once_and_is_up_to_date(kind, tmp_path):
    model = make_model_of(kind)
    names, snapshot = CheckpointNames(model), gather_weights(model)
    first = names.of(snapshot)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    again = names.of(gather_weights(model, into=snapshot))
    assert again is first
    assert equal(again, written(model, tmp_path))


def test_other_memory_is_named_anew(tmp_path):
    model = make_model_of("qwen3_moe")
    names = CheckpointNames(model)
    names.of(gather_weights(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert equal(names.of(gather_weights(model)), written(model, tmp_path))


def test_a_folder_in_the_layout_of_memory_does_not_decide_what_is_sent(tmp_path):
    model = make_model_of("qwen3_moe")
    expected = written(model, tmp_path / "checkpoint")
    held = written(model, tmp_path / "memory", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in held
    with without_bars():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory", dtype=torch.float32)
    assert equal(CheckpointNames(loaded).of(gather_weights(loaded)), expected)


def test_adapters_and_compilers_leave_no_trace_in_names(tmp_path):
    pytest.importorskip("peft")
    model = make_model_of("hrm_text")
    expected = written(model, tmp_path)
    LoRA(rank=2, targets=("q_proj",)).add_to(model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    compiled = nn.Module()
    compiled.add_module("_orig_mod", layers[0])
    layers[0] = compiled
    assert equal(CheckpointNames(model).of(gather_weights(model)), expected)


def test_experts_can_not_have_an_adapter_that_servers_would_not_get():
    pytest.importorskip("peft")
    for targets in (None, ("gate_up_proj",), ("down_proj",), ("experts",)):
        with pytest.raises(ConfigError, match=r"lora\.targets"):
            LoRA(rank=2, targets=targets).add_to(make_model_of("qwen3_moe"))


def test_origins_name_each_element_of_what_is_no_slice():
    model = make_model_of("hrm_text")
    own = model.state_dict()
    names = CheckpointNames(model)
    origins, sent = names.origins(own), names.of(own)
    held = torch.cat([tensor.flatten() for tensor in own.values()])
    assert origins.keys() == sent.keys() - names.views(own).keys()
    assert origins
    assert all(torch.equal(held[places], sent[name]) for name, places in origins.items())
    assert CheckpointNames(make_model_of("mixtral")).origins({}) == {}


@pytest.mark.parametrize(
    "operation",
    [lambda t: t + 1, lambda t: t.exp(), lambda t: t.clamp(max=5), torch.linalg.svdvals],
)
def test_a_checkpoint_of_other_values_has_no_origins(operation):
    model = make_model_of("qwen3")
    names = CheckpointNames(model, lambda tensors: {"w": operation(tensors["w"])})
    with pytest.raises(UnnamedWeightsError, match=r"other values|knows no places"):
        names.origins({"w": torch.zeros(3, 4)})
