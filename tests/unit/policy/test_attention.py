import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_grpo.policy.attention import (
    PackedLayout,
    packed_attention_forward,
    padded_attention,
    shared_prefixes,
)


def first_with_the_same_past(sequences):
    """For each token, by brute force, the position of its oldest twin in unbroken succession."""
    starts = [sum(map(len, sequences[:i])) for i in range(len(sequences))]
    expected = []
    for i, tokens in enumerate(sequences):
        for t in range(len(tokens)):
            j = i
            while j > 0 and sequences[j - 1][: t + 1] == tokens[: t + 1]:
                j -= 1
            expected.append(starts[j] + t)
    return expected


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=7))
def test_shared_prefixes_are_those_found_by_brute_force(sequences):
    ids = torch.tensor([t for tokens in sequences for t in tokens], dtype=torch.int64)
    cu_seqlens = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    assert shared_prefixes(ids, cu_seqlens).tolist() == first_with_the_same_past(sequences)


def naive(query, key, value, cu_seqlens, scale, window):
    """Causal attention within each sequence, one at a time, by the formula."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        distance = torch.arange(end - start)
        distance = distance.unsqueeze(1) - distance
        visible = (distance >= 0) & (distance < (window or end))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 3])
@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    heads=st.sampled_from([(2, 2), (4, 1), (4, 2)]),
    seed=st.integers(0, 99),
)
def test_padding_changes_neither_values_nor_gradients(window, lengths, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def random(num_heads):
        shape = (sum(lengths), num_heads, 8)
        tokens = torch.randn(shape, generator=generator, dtype=torch.float64)
        return tokens.requires_grad_()

    inputs = random(heads[0]), random(heads[1]), random(heads[1])
    found = padded_attention(*inputs, PackedLayout(cu_seqlens), 0.3, window)
    expected = naive(*inputs, cu_seqlens, 0.3, window)
    assert torch.allclose(found, expected, atol=1e-12)
    probe = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for left, right in zip(
        torch.autograd.grad(found, inputs, probe),
        torch.autograd.grad(expected, inputs, probe),
        strict=True,
    ):
        assert torch.allclose(left, right, atol=1e-12)


def test_sequences_of_similar_length_are_padded_together():
    cu_seqlens = torch.tensor([0, 10, 110, 119, 219]).cumsum(0) * 0 + torch.tensor(
        [0, 10, 110, 119, 219]
    )
    buckets, _ = PackedLayout(cu_seqlens).padded()
    assert [(b.num_sequences, b.length) for b in buckets] == [(2, 100), (2, 10)]


def test_a_group_computes_its_prompt_once():
    prompt = [1, 2, 3, 4]
    sequences = [[*prompt, *answer] for answer in ([5, 6], [5, 7], [8])]
    cu_seqlens = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    layout = PackedLayout(cu_seqlens, torch.tensor([t for s in sequences for t in s]))
    assert len(layout.unique) == 4 + 2 + 1 + 1
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 4]
    assert layout.unique_of.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 6, 0, 1, 2, 3, 7]
    assert len(PackedLayout(cu_seqlens).unique) == 17


def test_a_call_without_bounds_is_refused_with_the_way_out():
    tokens = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="call the model through PackedPolicy"):
        packed_attention_forward(nn.Module(), tokens, tokens, tokens, None)
