""""""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightning_grpo.certify.tiny import tiny_config, tiny_model
from lightning_grpo.errors import ConfigError, WeightSyncError
from lightning_grpo.policy.adapted import AdaptedLinear
from lightning_grpo.policy.load import export_policy, load_policy
from lightning_grpo.policy.lora import LoRA, WithoutAdapter, export_adapter
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.weights.gather import gather_weights
from tests.fakes.adapters import LORA, make_trained, set_adapter
from tests.fakes.causal_models import make_model_of, make_sequences, pack
from tests.fakes.devices import ON_A_GPU
from tests.fakes.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", hidden_size=32))


def test_training_begins_at_the_model_and_only_the_adapter_is_trained(folder):
    packed = pack(make_sequences([9, 12]))
    expected, _ = PackedPolicy(load_policy(folder))(*packed)
    model = load_policy(folder)
    LORA.add_to(model)
    policy = PackedPolicy(model)
    found, _ = policy(*packed)
    assert torch.equal(found, expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven matrices each
    assert all("lora_" in name for name in trained)
    found.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_merged_weights_are_those_that_peft_merges_under_the_checkpoint_s_names(folder):
    policy = make_trained(folder)
    theirs = copy.deepcopy(policy.model)
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    expected = {
        name.replace(".base_layer", ""): value
        for name, value in theirs.named_parameters()
        if "lora_" not in name
    }
    merged = gather_weights(policy)
    assert merged.keys() == expected.keys()
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        assert merged.keys() == set(file.keys())
        moved = [n for n, value in merged.items() if not torch.equal(value, file.get_tensor(n))]
    assert len(moved) == 2 * 7
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_a_wrapped_weight_that_can_t_be_merged_is_refused(folder):
    policy = make_trained(folder)
    attention = policy.model.model.layers[0].self_attn
    attention.q_proj = nn.ModuleDict({"base_layer": attention.q_proj.base_layer})
    with pytest.raises(WeightSyncError, match=r"q_proj \(ModuleDict\) wraps a weight"):
        gather_weights(policy)


def test_in_bf16_the_servers_get_what_an_adapter_adds_however_small(folder):
    policy = make_trained(folder)
    for name, parameter in policy.model.named_parameters():
        parameter.data *= 1e-3 if "lora_B" in name else 1
        parameter.data = parameter.data.bfloat16().float()  # as checkpoints come
    base = {
        name.replace(".base_layer", ""): value for name, value in policy.model.named_parameters()
    }
    sent, whole = gather_weights(policy, torch.bfloat16), gather_weights(policy)
    kept = []
    for name, value in whole.items():
        added, arrived = value - base[name], sent[name].float() - base[name]
        if added.any():
            kept.append(((added * arrived).sum() / added.square().sum()).item())
        else:
            assert not arrived.any()
    assert len(kept) == 2 * 7
    assert sum(kept) / len(kept) == pytest.approx(1.0, abs=0.1)


def test_the_policy_without_its_adapter_is_the_model_itself_and_trains_on_after_it(folder):
    packed = pack(make_sequences([9, 12]))
    expected, _ = PackedPolicy(load_policy(folder))(*packed)
    policy = make_trained(folder)
    before, _ = policy(*packed)
    assert not torch.allclose(before, expected, atol=1e-2)
    found, _ = WithoutAdapter(policy)(*packed)
    assert torch.equal(found, expected)
    after, _ = policy(*packed)
    assert torch.equal(after, before)
    after.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked by PEFT
def test_the_exported_folder_and_the_exported_adapter_compute_what_the_policy_does(
    folder, tmp_path
):
    policy, ids = make_trained(folder), make_sequences([12])
    with torch.no_grad():
        expected, _ = policy(*pack(ids))
    export_policy(policy.model, None, tmp_path / "merged", gather_weights(policy))
    merged = PackedPolicy(load_policy(str(tmp_path / "merged")))
    assert torch.allclose(merged(*pack(ids))[0], expected, atol=1e-5)
    export_adapter(policy.model, folder, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    logprobs = torch.log_softmax(theirs(ids[0].unsqueeze(0)).logits[0], -1)[:-1]
    found = logprobs.gather(1, ids[0][1:].unsqueeze(1)).squeeze(1)
    assert torch.allclose(found, expected[1:], atol=1e-5)


def test_named_targets_are_adapted_and_nothing_else(folder):
    model = load_policy(folder)
    LoRA(targets=("q_proj", "down_proj")).add_to(model)
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "down_proj"}


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "self_attn"])
def test_a_target_that_is_no_linear_layer_below_the_head_is_refused_with_those_that_are(
    folder, target
):
    with pytest.raises(ConfigError, match=rf"lora\.targets.*{target}\. It has .*q_proj"):
        LoRA(targets=("q_proj", target)).add_to(load_policy(folder))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}, {"targets": ()}])
def test_settings_that_make_no_adapter_are_refused(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"`lora\.{name}` must"):
        LoRA(**settings)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"pip install 'lightning-grpo\[lora\]'"):
        LoRA()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked by PEFT
@pytest.mark.parametrize(
    ("kind", "settings", "targets"),
    [
        ("gpt2", {}, ("c_attn",)),  # layers whose weights are transposed
        ("gpt2", {}, None),
        ("qwen3_moe", {}, ("q_proj", "v_proj")),
        ("mixtral", {"sliding_window": None}, ("o_proj",)),
        ("qwen2_moe", {}, ("down_proj",)),  # of the shared expert
        ("phi3", {}, None),
    ],
)
def test_merged_exported_and_adapted_are_one_model_in_other_architectures(
    kind, settings, targets, tmp_path
):
    make_model_of(kind, **settings).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model = load_policy(base)
    LoRA(rank=4, alpha=6, targets=targets).add_to(model)
    set_adapter(model)
    policy, packed = PackedPolicy(model), pack(make_sequences([12]))
    adapted, _ = policy(*packed)
    assert not torch.allclose(PackedPolicy(load_policy(base))(*packed)[0], adapted, atol=0.05)
    assert torch.equal(
        WithoutAdapter(policy)(*packed)[0], PackedPolicy(load_policy(base))(*packed)[0]
    )
    export_policy(model, None, tmp_path / "merged", gather_weights(policy))
    merged, _ = PackedPolicy(load_policy(str(tmp_path / "merged")))(*packed)
    assert torch.allclose(merged, adapted, atol=1e-5)
    export_adapter(model, base, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")
    )
    ids = packed[0]
    logprobs = torch.log_softmax(theirs.eval()(ids.unsqueeze(0)).logits[0], -1)[:-1]
    found = logprobs.gather(1, ids[1:].unsqueeze(1)).squeeze(1)
    assert torch.allclose(found, adapted[1:], atol=1e-5)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_an_export_with_an_adapter_keeps_the_buffers_that_belong_to_the_checkpoint(kind, tmp_path):
    base = make_model_of(kind)
    router = next(name for name in base.state_dict() if name.endswith("e_score_correction_bias"))
    base.get_buffer(router).copy_(torch.tensor([0.0, 4.0, -4.0, 8.0]))
    base.save_pretrained(tmp_path / "base")
    model = load_policy(str(tmp_path / "base"))
    LoRA(rank=4, targets=("o_proj",)).add_to(model)
    set_adapter(model)
    policy, packed = PackedPolicy(model), pack(make_sequences([12]))
    export_policy(model, None, tmp_path / "merged", gather_weights(policy))
    merged = PackedPolicy(load_policy(str(tmp_path / "merged")))
    assert torch.equal(merged.model.get_buffer(router), base.get_buffer(router))
    assert torch.allclose(merged(*packed)[0], policy(*packed)[0], atol=1e-5)


def test_weights_that_several_layers_have_in_common_are_refused():
    model = tiny_model(tiny_config(CONFIG_MAPPING["zamba2"]()))
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj of Zamba2ForCausalLM have the same"):
        LoRA(targets=("q_proj",)).add_to(model)


def test_linear_layers_of_a_hybrid_are_all_adapted():
    model = tiny_model(tiny_config(CONFIG_MAPPING["qwen3_5_text"]()))
    LoRA().add_to(model)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj"} < adapted


@pytest.mark.parametrize(
    ("kind", "settings", "targets", "message"),
    [
        ("qwen3_moe", {}, None, "name layers of Qwen3MoeForCausalLM, .* It has k_proj, o_proj"),
        ("mixtral", {}, None, "name layers of MixtralForCausalLM, whose experts are one tensor"),
        ("mixtral", {}, ("w1",), r"got w1\. It has k_proj, o_proj, q_proj, v_proj"),
        (
            "qwen3_moe",  # PEFT takes the dense layer's names for the experts of the other
            {"mlp_only_layers": [0]},
            ("gate_proj", "up_proj", "down_proj"),
            "leave out the experts of Qwen3MoeForCausalLM .* got gate_proj, up_proj, down_proj",
        ),
        ("deepseek_v3", {}, ("gate_proj",), "that PEFT can adapt, got gate_proj: .* up_proj"),
        ("phimoe", {}, ("router",), r"leave out router of .* \(PhimoeTopKRouter, which computes"),
    ],
)
def test_fused_experts_which_servers_would_not_get_are_refused(kind, settings, targets, message):
    model = make_model_of(kind, **settings)
    with pytest.raises(ConfigError, match=message):
        LoRA(targets=targets).add_to(model)


def make_layer(kind, bias, size=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128, bias=bias))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    config._register_custom_module({nn.Linear: kind})
    (layer,) = inject_adapter_in_model(config, model)
    assert type(layer) is kind
    layer.lora_B["default"].weight.data.normal_().mul_(size)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_peft_s_layer_does_gradients_included(bias):
    x = torch.randn(2, 3, 256)
    outs, gradients = [], []
    for kind in (AdaptedLinear, Linear):
        layer, own = make_layer(kind, bias), x.clone().requires_grad_()
        outs.append(layer(own))
        outs[-1].square().sum().backward()
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        gradients.append([own.grad, *(weight.grad for weight in weights)])
    assert torch.allclose(*outs, atol=1e-5)
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_gradients_in_half_precision_are_those_of_the_exact_layer_rounded():
    layer, x = make_layer(AdaptedLinear, bias=True).bfloat16(), torch.randn(40, 256).bfloat16()
    layer.get_base_layer().weight.requires_grad_()
    exact, wide = copy.deepcopy(layer).double(), x.double().requires_grad_()
    own = x.requires_grad_()
    probe = torch.randn(40, 128)
    (layer(own).float() * probe).sum().backward()
    (exact(wide) * probe).sum().backward()
    found, expected = (
        [tensor.grad, *(p.grad for p in each.parameters() if p.requires_grad)]
        for tensor, each in ((own, layer), (wide, exact))
    )
    assert len(found) == 4
    for mine, right in zip(found, expected, strict=True):
        assert (mine.double() - right).norm() < 0.01 * right.norm()


def test_under_autocast_an_update_below_half_a_unit_counts_in_full_too():
    layer, x = make_layer(AdaptedLinear, bias=False, size=1e-4), torch.randn(600, 256)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x).float()
        update = layer.lora_B["default"](layer.lora_A["default"](x)).float() * 2
        layer.set_scale("default", 0.0)
        without = layer(x).float()
    kept = ((found - without) * update).sum() / update.square().sum()
    assert kept.item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
@pytest.mark.parametrize("bias", [False, True])
def test_in_bf16_an_update_below_half_a_unit_counts_in_full(bias, device):
    layer = make_layer(AdaptedLinear, bias, size=1e-4).to(device, torch.bfloat16)
    x = torch.randn(600, 256).to(device, torch.bfloat16)
    with torch.no_grad():
        found = layer(x).float()
        update = layer.lora_B["default"](layer.lora_A["default"](x)).float() * 2
        layer.set_scale("default", 0.0)
        without = layer(x).float()
    assert torch.equal(without, layer.base_layer(x).float())
    half_a_unit = without.abs() * torch.finfo(torch.bfloat16).eps / 4
    assert (update.abs() < half_a_unit).float().mean() > 0.8
    kept = ((found - without) * update).sum() / update.square().sum()
    assert kept.item() == pytest.approx(1.0, abs=0.1)
