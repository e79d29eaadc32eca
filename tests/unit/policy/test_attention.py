import copy
from functools import partial

import pytest
import torch
import torch._inductor.config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_grpo.algorithm.layers import ScoreForm
from lightning_grpo.policy.attention import (
    LONG,
    PackedLayout,
    _Pick,
    _Spread,
    has_packed_kernel,
    length_switches,
    longest_steady,
    packed_attention_forward,
    padded_attention,
    shared_prefixes,
    turns,
    usable_context,
    varlen_attention,
)
from lightning_grpo.policy.load import load_policy, materialize_from_folder
from lightning_grpo.policy.packed import PackedPolicy, compile_blocks
from tests.fakes.causal_models import (
    make_causal_model,
    make_model_of,
    make_sequences,
    pack,
    plain_logprobs,
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


def naive(query, key, value, cu_seqlens, scale, window, softcap, sinks):
    """Causal attention within each sequence, one at a time, by the formula."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        distance = torch.arange(end - start)
        distance = distance.unsqueeze(1) - distance
        visible = (distance >= 0) & (distance < (window or end))
        scores = q @ k.transpose(1, 2) * scale
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        shares = scores.exp() * visible
        whole = shares.sum(-1, keepdim=True)
        whole = whole if sinks is None else whole + sinks.exp().view(-1, 1, 1)
        outs.append((shares / whole @ v).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    heads=st.sampled_from([(2, 2), (4, 1), (4, 2)]),
    seed=st.integers(0, 99),
)
def test_padding_changes_neither_values_nor_gradients(
    window, softcap, has_sinks, lengths, heads, seed
):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def random(num_heads):
        shape = (sum(lengths), num_heads, 8)
        tokens = torch.randn(shape, generator=generator, dtype=torch.float64)
        return tokens.requires_grad_()

    inputs = random(heads[0]), random(heads[1]), random(heads[1])
    sinks = None
    if has_sinks:
        sinks = torch.randn(heads[0], generator=generator, dtype=torch.float64).requires_grad_()
    form = ScoreForm.of({"softcap": softcap, "s_aux": sinks})
    found = padded_attention(*inputs, PackedLayout(cu_seqlens), 0.3, window, form)
    expected = naive(*inputs, cu_seqlens, 0.3, window, softcap, sinks)
    inputs = (*inputs, sinks) if has_sinks else inputs
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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_tokens_that_sequences_share_add_up(compiled):
    def through(function):
        whole = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=True)
        return whole(function) if compiled else function

    sequences = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7], [9, 2]]
    cu_seqlens = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    layout = PackedLayout(cu_seqlens, torch.tensor([t for s in sequences for t in s]))
    assert layout.repeats.tolist() == [4, 5, 6, 9, 10]
    values = torch.randn(len(layout.unique), 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(layout.num_tokens, 2, 3, dtype=torch.float64)
    unique, unique_of, repeats = layout.unique, layout.unique_of, layout.repeats

    def spread(values):
        return _Spread.apply(values, unique, unique_of, repeats)

    def picked(values):
        return _Pick.apply(_Spread.apply(values, unique, unique_of, repeats) * weights, unique)

    plainly = values.index_select(0, unique_of)
    for ours, plain in (
        (through(spread)(values), plainly),
        (through(picked)(values), (plainly * weights).index_select(0, unique)),
    ):
        assert torch.equal(ours, plain)
        probe = torch.randn_like(plain)
        (mine,) = torch.autograd.grad(ours, values, probe)
        (theirs,) = torch.autograd.grad(plain, values, probe, retain_graph=True)
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_a_call_without_bounds_is_refused_with_the_way_out():
    tokens = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="call the model through PackedPolicy"):
        packed_attention_forward(nn.Module(), tokens, tokens, tokens, None)


# ---- rope ---------------------------------------------------------------------------------------

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24},
    **{"factor": 4.0, **FACTORS},
}
PHI3 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 24},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    **{"original_max_position_embeddings": 24},
}
PHIMOE = {"rope_parameters": {**YARN, "short_mscale": 1.1, "long_mscale": 1.4}}
DEPENDING_ON_LENGTH = [
    ("phi3", PHI3),
    ("llama", {"rope_parameters": LONGROPE}),
    ("phimoe", {"rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4}}),
    (
        "gemma3_text",  # full attention has its own RoPE
        {
            "rope_parameters": {
                "full_attention": LONGROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen3", {"rope_parameters": YARN}),
    ("phimoe", PHIMOE),  # changes its scale under any kind
]
LENGTHS = (12, 24, 9, 30, 27, 12, 25)


@pytest.mark.parametrize(("kind", "settings"), DEPENDING_ON_LENGTH)
def test_each_row_gets_the_factors_that_it_has_alone_whatever_it_is_packed_with(kind, settings):
    model = make_model_of(kind, **settings)
    sequences = make_sequences(LENGTHS, shared=9)  # the two of a pair begin alike
    # Each alone in a fresh model: some remember the longest sequence they have seen.
    alone = [plain_logprobs(copy.deepcopy(model), [ids])[0] for ids in sequences]
    policy = PackedPolicy(model)
    for _ in range(2):
        together, _ = policy(*pack(sequences))
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    for ids, expected in zip(sequences, alone, strict=True):
        assert torch.allclose(policy(ids)[0], expected, atol=1e-5)


def test_without_groups_a_long_row_would_change_the_short_ones():
    model = make_model_of("phi3", **PHI3)
    sequences = make_sequences(LENGTHS)
    expected = torch.cat([plain_logprobs(copy.deepcopy(model), [ids])[0] for ids in sequences])
    policy = PackedPolicy(model)
    policy._factors._rotaries.clear()
    assert not torch.allclose(policy(*pack(sequences))[0], expected, atol=0.1)


def test_a_model_filled_on_the_meta_device_switches_too(tmp_path):
    make_model_of("phi3", **PHI3).save_pretrained(tmp_path)
    packed = pack(make_sequences(LENGTHS))
    expected, _ = PackedPolicy(load_policy(str(tmp_path)))(*packed)
    model = load_policy(str(tmp_path), meta=True)
    policy = PackedPolicy(model)
    materialize_from_folder(model, str(tmp_path))
    assert torch.allclose(policy(*packed)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "switches", "steady"),
    [
        ("qwen3", {}, (), None),
        ("llama", {"rope_parameters": LLAMA3}, (), None),
        ("qwen3", {"rope_parameters": YARN}, (), None),
        ("phi3", PHI3, (24,), 24),
        ("phimoe", PHIMOE, (24,), 24),
        ("phi3", {**PHI3, "sliding_window": 8}, (8, 24), 24),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 48}, (48,), 48),
        ("mistral", {"sliding_window": 16}, (16,), None),
        ("mistral", {"sliding_window": None}, (), None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, (), None),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            (16,),
            None,
        ),
        ("qwen2", {"layer_types": ["full_attention"] * 2, "use_sliding_window": True}, (), None),
        (*DEPENDING_ON_LENGTH[3], (8, 24), 24),
        (
            "ministral3",  # queries are scaled by how far they are
            {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}, "sliding_window": None},
            (24,),
            None,
        ),
    ],
)
def test_a_config_tells_the_lengths_at_which_a_model_computes_in_another_way(
    kind, settings, switches, steady
):
    config = make_model_of(kind, **settings).config
    assert length_switches(config) == switches
    assert longest_steady(config) == steady


def test_the_usable_context_ends_where_rope_switches_and_a_line_says_so(caplog):
    assert usable_context(make_model_of("qwen3").config) == 128
    assert not caplog.records
    assert usable_context(make_model_of("phi3", **PHI3).config) == 24
    assert "at most 24 tokens, although phi3 has a context of 128" in caplog.text


# -- the kernel of GPUs ----------------------------------------------------------------------------

ON_GPU = (40, 119, 3, 77)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("lengths", [ON_GPU, ON_GPU[:1]])
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


def test_each_long_sequence_is_computed_alone_and_others_with_their_neighbors():
    lengths = [0, 3, LONG - 1, LONG, LONG + 5, 7, 0, LONG, 0, 0]
    ways = [(rows.start, rows.stop) for rows in turns(lengths)]
    assert ways == [(0, 3), (3, 4), (4, 5), (5, 7), (7, 8)]
    assert turns([0, 0]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_long_sequences_apart_are_what_they_are_in_one_kernel():
    lengths = torch.tensor([0, 5, 900, LONG, 3, LONG + 77])
    ids = torch.randint(9, (int(lengths[1:].sum()),), device="cuda")
    layout = PackedLayout(lengths.cumsum(0).cuda(), ids)
    shape = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query = torch.randn(len(layout.unique), 4, 64, **shape)
    key, value = (torch.randn(len(layout.unique), 2, 64, **shape) for _ in range(2))
    assert layout.has_long
    apart = varlen_attention(query, key, value, layout)
    layout.has_long = False
    together = varlen_attention(query, key, value, layout)
    probe = torch.randn_like(apart)
    found, expected = (
        (out, *torch.autograd.grad(out, (query, key, value), probe)) for out in (apart, together)
    )
    for left, right in zip(found, expected, strict=True):
        assert ((left - right).norm() / right.norm()).item() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_bf16_policy_on_the_gpu_is_near_the_fp32_one():
    packed = [t.cuda() for t in pack(make_sequences(ON_GPU, shared=3))]
    exact, _ = PackedPolicy(make_causal_model().cuda())(*packed)
    found, _ = PackedPolicy(make_causal_model(dtype=torch.bfloat16).cuda())(*packed)
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean().item() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
    for lengths in (ON_GPU, (7, 90, 12), (300, 4, 60, 31, 9)):
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
