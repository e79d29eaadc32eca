import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lightning_grpo.policy.packed import PackedPolicy, fuse_norms, is_plain
from tests.fakes.causal_models import make_causal_model, make_sequences, pack


class NamedRMSNorm(nn.Module):
    """Takes something else than a size."""

    def __init__(self):
        super().__init__()


@pytest.mark.parametrize("kind", [Qwen2RMSNorm, Qwen3RMSNorm, LlamaRMSNorm])
def test_norms_that_scale_by_their_weight_are_known(kind):
    assert is_plain(kind)


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, NamedRMSNorm, nn.LayerNorm, nn.Linear])
def test_others_are_left_alone(kind):
    assert not is_plain(kind)


def test_a_kind_is_known_also_where_the_model_is_made_without_storage():
    with torch.device("meta"):
        assert is_plain(Qwen3RMSNorm)


def test_on_a_cpu_the_model_computes_what_it_did_and_can_be_copied():
    model, packed = make_causal_model(), pack(make_sequences([9, 12]))
    expected, _ = PackedPolicy(copy.deepcopy(model))(*packed)
    fuse_norms(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(PackedPolicy(twin)(*packed)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_values_and_gradients_are_the_same():
    norm = Qwen3RMSNorm(256).cuda()
    norm.weight.data.normal_()
    rows = torch.randn(3, 5, 256, device="cuda", requires_grad=True)
    expected = norm(rows)
    wanted = torch.autograd.grad(expected.square().sum(), [rows, norm.weight])
    fuse_norms(norm)
    found = norm(rows)
    assert torch.allclose(found, expected, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), [rows, norm.weight]), wanted, strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-3)
    half = norm.to(torch.bfloat16)
    assert half(rows.bfloat16()).dtype == torch.bfloat16
