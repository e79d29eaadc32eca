"""Layers with a state begin anew at each sequence of a packed row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from lightning_grpo.certify.tiny import pack, plain_logprobs, random_ids, tiny_config, tiny_model
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.load import checkpoint_activations
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.policy.recurrent import heeds_bounds, recurrent_parts
from tests.fakes.causal_models import make_model_of

HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
LENGTHS = (7, 12, 131, 3, 1, 64, 2, 5, 65)
"""Below and above a convolution's window, and a chunk of the gated delta rule."""


def model_of(kind, dtype=torch.float32):
    return tiny_model(tiny_config(CONFIG_MAPPING[kind]()), dtype=dtype)


def rows_of(lengths, shared=0):
    generator = torch.Generator().manual_seed(0)
    prompt = random_ids(shared, generator)
    return [torch.cat([prompt, random_ids(n, generator)]) for n in lengths]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_packed_rows_are_what_each_is_alone(kind, share):
    rows = rows_of(LENGTHS)
    with torch.no_grad():
        expected = plain_logprobs(model_of(kind), rows)
        found, _ = PackedPolicy(model_of(kind), share_prefixes=share)(*pack(rows))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_rows_of_no_token_and_of_one_change_nothing():
    rows = rows_of([0, 5, 0, 0, 1, 1, 0, 9, 0])
    policy = PackedPolicy(model_of("qwen3_next"))
    with torch.no_grad():
        expected = plain_logprobs(model_of("qwen3_next"), [row for row in rows if len(row)])
        found, _ = policy(*pack(rows))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 21, 70])
def test_what_follows_a_shared_prompt_continues_its_state_and_window(prompt):
    rows = rows_of([5, 1, 0, 12], shared=prompt)
    shared, alone = PackedPolicy(model_of("qwen3_next")), model_of("qwen3_next")
    found, _ = shared(*pack(rows))
    expected = plain_logprobs(alone, rows)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    for logprobs in (found, expected):
        (logprobs * torch.arange(len(logprobs)).sin()).sum().backward()
    for name, grad in gradients(alone).items():
        torch.testing.assert_close(gradients(shared.model)[name], grad, atol=5e-5, rtol=1e-3)


def test_blocks_that_are_computed_again_get_the_same_bounds():
    rows, other = rows_of(LENGTHS), rows_of([4, 40])
    plain, again = PackedPolicy(model_of("qwen3_5_text")), PackedPolicy(model_of("qwen3_5_text"))
    checkpoint_activations(again.model)
    plain(*pack(rows))[0].sum().backward()
    logprobs, _ = again.train()(*pack(rows))
    with torch.no_grad():
        again(*pack(other))  # as a reference's pass between both
    logprobs.sum().backward()
    for name, grad in gradients(plain.model).items():
        torch.testing.assert_close(gradients(again.model)[name], grad, atol=1e-5, rtol=1e-5)


class Sums(nn.Module):
    """A running sum of the row, which begins anew where it is told to."""

    def __init__(self, heeds=True):
        super().__init__()
        self.heeds = heeds

    def forward(self, hidden_states, cache_params=None, cu_seq_lens_q=None, **kwargs):
        total = hidden_states.cumsum(1)
        if cu_seq_lens_q is None or not self.heeds:
            return total
        parts = hidden_states.split(cu_seq_lens_q.diff().tolist(), 1)
        return torch.cat([part.cumsum(1) for part in parts], 1)


class WithoutKernels(Sums):
    def forward(self, hidden_states, cache_params=None, cu_seq_lens_q=None, **kwargs):
        if cu_seq_lens_q is not None:
            raise ValueError("`chunk_gated_delta_rule` can't keep packed sequences apart")
        return super().forward(hidden_states)


def test_kernels_are_told_the_bounds_only_if_they_heed_them():
    like = torch.zeros(1, 3, 8)
    assert heeds_bounds(Sums(), like)
    assert not heeds_bounds(Sums(heeds=False), like)
    assert not heeds_bounds(WithoutKernels(), like)


class Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total):
        return total.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("Triton 3.6 makes wrong gradients here. Install tilelang.")


class WithoutGradient(Sums):
    def forward(self, *args, **kwargs):
        return Refused.apply(super().forward(*args, **kwargs))


@pytest.mark.parametrize("heeds", [True, False])
def test_kernels_without_a_gradient_are_refused_when_they_are_tried(heeds):
    refused = "can be trained through, those of WithoutGradient fail .* Install tilelang. Way out"
    with torch.no_grad(), pytest.raises(ConfigError, match=refused):
        heeds_bounds(WithoutGradient(heeds), torch.zeros(1, 3, 8))


def test_kernels_get_each_sequence_whole_also_where_prompts_are_shared():
    model = model_of("qwen3_5_text")
    policy = PackedPolicy(model)
    (part,) = recurrent_parts(model)
    heard = []

    class Told(type(part)):
        def forward(self, hidden_states, cu_seq_lens_q=None, seq_idx=None, **kwargs):
            if cu_seq_lens_q is None:
                return super().forward(hidden_states, **kwargs)
            heard.append((cu_seq_lens_q.tolist(), seq_idx.tolist()))
            rows = hidden_states.split(cu_seq_lens_q.diff().tolist(), 1)
            return torch.cat([super(Told, self).forward(row, **kwargs) for row in rows], 1)

    rows = rows_of([2, 1], shared=5)
    with torch.no_grad():
        padded, _ = policy(*pack(rows))
        part.__class__, part.keeps_apart = Told, True
        told, _ = policy(*pack(rows))
    torch.testing.assert_close(told, padded, atol=2e-6, rtol=0)
    assert heard == [([0, 7, 13], [[0] * 7 + [1] * 6])]


def test_layers_of_which_it_is_not_known_how_to_begin_anew_are_refused():
    model = model_of("qwen3_5_text")
    model.config.layer_types = ["indexed_attention", "full_attention"]
    with pytest.raises(ConfigError, match=r"\['indexed_attention'\], which would run across"):
        PackedPolicy(model)
    model.config.layer_types = ["linear_attention", "linear_attention"]
    with pytest.raises(ConfigError, match=r"2 layers, 1 that could"):
        PackedPolicy(model)


def test_a_layer_that_is_not_told_where_sequences_begin_is_refused():
    model = model_of("qwen3_5_text")
    policy = PackedPolicy(model)
    (part,) = recurrent_parts(model)
    forward = part.forward
    part.forward = lambda packing, **kwargs: forward(**kwargs)
    with pytest.raises(ConfigError, match="doesn't tell these layers"):
        policy(*pack(rows_of([3, 4])))
    part.forward = lambda **kwargs: forward(**{**kwargs, "attention_mask": torch.ones(1, 7)})
    with pytest.raises(ConfigError, match="gives these layers a mask"):
        policy(*pack(rows_of([3, 4])))


def test_attention_that_a_hybrid_computes_itself_is_refused():
    model = model_of("qwen3_5_text")
    policy = PackedPolicy(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="0 of 1 asked for it"):
        policy(*pack(rows_of([3, 4])))


def test_attention_alone_grows_with_the_square_of_the_length():
    policy = PackedPolicy(model_of("qwen3_5_text"))
    text = policy.model.config
    short, long = policy.flops([100], 0), policy.flops([200], 0)
    width = text.num_attention_heads * text.head_dim
    assert long - 2 * short == 6 * width * (200**2 - 2 * 100**2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_kernels_and_padding_give_the_same():
    sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "hidden_size": 64}
    kinds = ["linear_attention", "full_attention"]
    model = make_model_of("qwen3_5_text", layer_types=kinds, **sizes)
    policy = PackedPolicy(model.cuda().bfloat16())
    packed = [each.cuda() for each in pack(rows_of(LENGTHS, shared=5))]
    with torch.no_grad():
        found, _ = policy(*packed)  # told where sequences begin, if the kernels are installed
        for part in recurrent_parts(model):
            part.keeps_apart = False
        padded, _ = policy(*packed)
    assert (found - padded).abs().mean() < 0.05
