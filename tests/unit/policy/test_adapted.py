import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

from lightning_grpo.policy.adapted import AdaptedLinear
from tests.fakes.devices import ON_A_GPU


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
