"""A policy whose blocks and head are compiled: the same numbers, and compiled once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_grpo._compat import compile_sparingly
from lightning_grpo.policy.lora import LoRA, WithoutAdapter
from lightning_grpo.policy.packed import PackedPolicy, compile_blocks, head_logprobs
from tests.fakes.causal_models import make_model_of
from tests.fakes.tiny_lm import VOCAB, make_lm


def packed(lengths):
    ids = torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, *lengths]).cumsum(0)


pytestmark = [  # the compiler's own
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_no_other_lengths_or_number_of_sequences_make_it_compile_again():
    policy = PackedPolicy(make_lm(), compiled=True, share_prefixes=False)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(policy.model, backend=counter)
    for lengths in ([5, 9], [7, 7], [30]):  # one sequence alone has attention of its own
        policy(*packed(lengths))[0].sum().backward()
    compiled = counter.frame_count
    assert compiled > 0
    for lengths in ([3, 4, 11], [2, 3, 4, 5], [21], [6, 1, 9, 12, 8, 3]):
        policy(*packed(lengths))[0].sum().backward()
    assert counter.frame_count == compiled


def test_values_and_gradients_are_those_of_the_policy_that_is_not_compiled():
    model = make_lm()
    plain = PackedPolicy(copy.deepcopy(model))
    policy = PackedPolicy(model, compiled=True)
    compile_blocks(model, backend="aot_eager")
    policy.max_logits = plain.max_logits = 4 * VOCAB
    for each in (plain, policy):
        logprobs, entropy = each(*packed([5, 9, 4]), 0.7, with_entropy=True)
        (logprobs.sin() + entropy.cos()).sum().backward()
    for expected, found in zip(plain.parameters(), policy.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_caps_and_sinks_reach_attention_where_blocks_are_compiled(kind):
    caps = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16} if kind == "gemma2" else {}
    model = make_model_of(kind, sliding_window=5, **caps)
    model.set_experts_implementation("eager")
    plain = PackedPolicy(copy.deepcopy(model))
    policy = PackedPolicy(model, compiled=True)
    compile_blocks(model, backend="eager")
    found, expected = (each(*packed([9, 12, 3]))[0] for each in (policy, plain))
    assert torch.allclose(found, expected, atol=1e-5)


class GatedMLP(nn.Module):
    """Whose product of both branches is read by a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@torch._inductor.config.patch(compile_threads=1)  # its threads would outlive the test
def test_a_block_keeps_nothing_that_is_cheap_to_compute_from_what_it_keeps():
    mlp, kept = GatedMLP(), []
    x = torch.randn(5, 8)
    expected = torch.autograd.grad(mlp(x).sin().sum(), [*mlp.parameters()])
    mlp.compile(backend=compile_sparingly)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = mlp(x)
    assert [tuple(each.shape) for each in kept].count((5, 32)) == 2
    asked = torch.autograd.grad(out.sin().sum(), [*mlp.parameters()])
    for found, each in zip(asked, expected, strict=True):
        assert torch.allclose(found, each, atol=1e-6)


def test_a_compiled_policy_keeps_its_names_and_can_be_copied():
    policy = PackedPolicy(make_lm(), compiled=True)
    assert list(policy.state_dict()) == list(PackedPolicy(make_lm()).state_dict())
    assert copy.deepcopy(policy).compiled


@pytest.mark.parametrize("max_kept", [0, 8 * 50, 1 << 20])  # nothing, one chunk of two, all
def test_a_head_that_keeps_probabilities_has_the_gradient_of_one_that_computes_them_again(max_kept):
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(13, 8, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(50, 8, generator=draw).bfloat16().requires_grad_()
    targets, temperature = torch.arange(13), torch.linspace(0.5, 2.0, 13)
    gradients = []
    for kept, compiled in ((0, False), (max_kept, True)):
        with torch.compiler.set_stance("force_eager"):
            found = head_logprobs(
                hidden, weight, targets, temperature, True, 8 * 50, compiled, max_kept=kept
            )
        assert found[1] is not None
        total = (found[0] * torch.linspace(-1, 1, 13)).sum() + found[1].cos().sum()
        with torch.compiler.set_stance("force_eager"):
            gradients.append(torch.autograd.grad(total, (hidden, weight)))
    for expected, seen in zip(*gradients, strict=True):
        assert (expected - seen).float().norm() < 0.01 * expected.float().norm()


@torch._inductor.config.patch(compile_threads=1)  # its processes would outlive the test
def test_the_last_chunk_of_a_head_is_compiled_with_the_others():
    torch._dynamo.utils.counters.clear()
    hidden, weight = torch.randn(14, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    for rows in (14, 12, 11):
        own = (hidden[:rows], weight, torch.arange(rows), torch.ones(rows))
        head_logprobs(*own, True, 4 * 50, compiled=True)[0].sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_an_adapters_scale_is_compiled_in_and_can_be_switched_off():
    def numbers_of_the_cpu(model):
        found = []

        def backend(graph, inputs):
            given = [n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder"]
            found.append(sum(isinstance(x, torch.Tensor) and x.ndim == 0 for x in given))
            return graph

        policy = PackedPolicy(model, compiled=True)
        compile_blocks(model, backend=backend)
        return policy, policy(*packed([5, 9]))[0], max(found)

    model = make_lm()
    _, expected, without = numbers_of_the_cpu(copy.deepcopy(model))
    LoRA(rank=4, alpha=8).add_to(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    torch._dynamo.reset()
    policy, adapted, num = numbers_of_the_cpu(model)
    assert num <= without
    assert not torch.allclose(adapted, expected)
    assert torch.allclose(WithoutAdapter(policy)(*packed([5, 9]))[0], expected)


def test_recurrent_layers_of_compiled_blocks_begin_anew_and_are_not_compiled_again():
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    plain = PackedPolicy(make_model_of("qwen3_5_text", **kinds))
    policy = PackedPolicy(make_model_of("qwen3_5_text", **kinds), compiled=True)
    counter, frames = CompileCounterWithBackend("aot_eager"), []
    compile_blocks(policy.model, backend=counter)
    for lengths in ([7, 12, 30, 3], [9, 9], [70, 4, 5], [11, 20]):
        ids, bounds = packed(lengths)
        found, _ = policy(ids, bounds)
        assert (found - plain(ids, bounds)[0]).abs().max() < 5e-6
        found.sum().backward()
        frames.append(counter.frame_count)
    assert frames[-1] == frames[-2]
