"""torch's variable-length kernel, on a GPU, against the padded form in fp64."""

import copy

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_grpo.policy.attention import (
    PackedLayout,
    has_packed_kernel,
    padded_attention,
    varlen_attention,
)
from lightning_grpo.policy.packed import PackedPolicy, compile_blocks
from tests.fakes.causal_models import make_causal_model, make_sequences, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (40, 119, 3, 77)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1]])
def test_the_kernel_equals_padded_attention(lengths, window):
    ids, cu_seqlens = (t.cuda() for t in pack(make_sequences(lengths, shared=3)))
    shape = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    layout = PackedLayout(cu_seqlens, ids)
    query = torch.randn(len(layout.unique), 4, 64, **shape)
    key, value = (torch.randn(len(layout.unique), 2, 64, **shape) for _ in range(2))
    assert has_packed_kernel(query)
    found = varlen_attention(query, key, value, layout, None, window)
    wide = (query.double(), key.double(), value.double())
    expected = padded_attention(*wide, layout, None, window)
    assert (found - expected).abs().max().item() < 0.02
    probe = torch.randn_like(found)
    for left, right in zip(
        torch.autograd.grad(found, (query, key, value), probe),
        torch.autograd.grad(expected, (query, key, value), probe.double()),
        strict=True,
    ):
        assert ((left - right).norm() / right.norm()).item() < 0.02


def test_a_bf16_policy_on_the_gpu_is_near_the_fp32_one():
    packed = [t.cuda() for t in pack(make_sequences(LENGTHS, shared=3))]
    exact, _ = PackedPolicy(make_causal_model().cuda())(*packed)
    found, _ = PackedPolicy(make_causal_model(dtype=torch.bfloat16).cuda())(*packed)
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean().item() < 0.05


@torch._inductor.config.patch(compile_threads=1)  # its processes would outlive the test
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_attention_is_compiled_with_its_block_and_other_lengths_compile_nothing_again():
    model = make_causal_model(dtype=torch.bfloat16).cuda()
    plain, policy = PackedPolicy(copy.deepcopy(model)), PackedPolicy(model, compiled=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("inductor")
    compile_blocks(policy.model, backend=counter)
    compilations = []
    for lengths in (LENGTHS, (7, 90, 12), (300, 4, 60, 31, 9)):
        packed = [t.cuda() for t in pack(make_sequences(lengths, shared=3))]
        gradients = []
        for each in (plain, policy):
            each.zero_grad()
            each(*packed)[0].sum().backward()
            gradients.append(torch.cat([p.grad.float().flatten() for p in each.parameters()]))
        assert ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item() < 0.05
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
