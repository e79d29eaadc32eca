import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lightning_grpo.algorithm.layers import fuse_norms, is_plain
from lightning_grpo.certify.tiny import AllInFp64
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import PackedLayout, packed_attention_forward
from lightning_grpo.policy.load import checkpoint_activations
from lightning_grpo.policy.packed import (
    LogitForm,
    PackedPolicy,
    chunk_rows,
    head_logprobs,
    predicted_positions,
)
from tests.fakes.causal_models import (
    ARCHITECTURES,
    VOCAB,
    make_causal_model,
    make_model_of,
    make_sequences,
    pack,
    plain_logprobs,
)
from tests.fakes.tiny_lm import make_lm

LENGTHS = (7, 12, 30, 3, 2, 9)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def relative(left, right):
    total = sum((left[name] - right[name]).square().sum() for name in right)
    return (total / sum(g.square().sum() for g in right.values())).sqrt().item()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_the_plain_forward_of_one_sequence_at_a_time(
    architecture, dtype, tolerance, share
):
    model = make_causal_model(architecture, dtype)
    sequences = make_sequences(LENGTHS, shared=5)
    expected, expected_entropy = plain_logprobs(model, sequences, 0.7)
    (expected.sin() + expected_entropy.cos()).sum().backward()
    expected_gradients = gradients(model)

    policy = PackedPolicy(model, share_prefixes=share)
    logprobs, entropy = policy(*pack(sequences), 0.7, with_entropy=True)
    (logprobs.sin() + entropy.cos()).sum().backward()
    assert ((logprobs - expected).norm() / expected.norm()).item() <= tolerance
    assert ((entropy - expected_entropy).norm() / expected_entropy.norm()).item() <= tolerance
    # Norms of these models round to fp32 in any dtype, so the order of summing shows in gradients.
    tolerance = max(tolerance, 1e-7) if share else tolerance
    assert relative(gradients(model), expected_gradients) <= 3 * tolerance


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    shared=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_packing_changes_nothing_for_any_lengths(lengths, shared, seed):
    policy = PackedPolicy(make_causal_model(dtype=torch.float64))
    sequences = make_sequences(lengths, seed, shared)
    together, _ = policy(*pack(sequences))
    alone = torch.cat([policy(*pack([tokens]))[0] for tokens in sequences])
    assert torch.allclose(together, alone, atol=1e-12)


def test_logprobs_stand_at_their_own_token_and_first_tokens_have_none():
    model = make_causal_model()
    sequences = make_sequences([4, 3])
    logprobs, entropy = PackedPolicy(model)(*pack(sequences))
    assert entropy is None
    assert logprobs[[0, 4]].tolist() == [0.0, 0.0]
    model.set_attn_implementation("sdpa")
    logits = model(sequences[1].unsqueeze(0)).logits[0]
    expected = logits[1].log_softmax(-1)[sequences[1][2]]
    assert logprobs[6].item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_wanted_positions_are_computed_and_they_do_not_change():
    policy = PackedPolicy(make_causal_model(dtype=torch.float64))
    packed = pack(make_sequences(LENGTHS))
    everything, _ = policy(*packed)
    wanted = torch.rand(len(packed[0]), generator=torch.Generator().manual_seed(0)) < 0.8
    with VocabRows() as spy:
        some, entropy = policy(*packed, with_entropy=True, positions_mask=wanted)
    assert torch.allclose(some, torch.where(wanted, everything, 0.0), atol=1e-12)
    assert (entropy[~wanted] == 0).all()
    # More than the rows of the head's transposed weight, which looks like logits too.
    assert policy.model.config.hidden_size < spy.rows < len(wanted) - len(LENGTHS)
    assert spy.rows == len(predicted_positions(PackedLayout(packed[1]), wanted))


class VocabRows(TorchDispatchMode):
    """Remembers the most rows that any tensor over the vocabulary had."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == VOCAB:
            self.rows = max(self.rows, out.numel() // VOCAB)
        return out


def test_logits_of_all_tokens_never_exist_at_once():
    model = make_causal_model(tie_word_embeddings=False)
    hidden_size = model.config.hidden_size  # rows of the transposed weight, no logits
    packed = pack(make_sequences([40, 50, 60]))
    with VocabRows() as spy:
        logprobs, entropy = PackedPolicy(model, max_logits=40 * VOCAB)(*packed, with_entropy=True)
        (logprobs + entropy).sum().backward()
    assert hidden_size < 40
    assert spy.rows == 40
    with VocabRows() as spy:
        PackedPolicy(model)(*packed)
    assert spy.rows == 147


def test_each_token_may_have_its_own_temperature():
    model = make_causal_model(dtype=torch.float64)
    sequences = make_sequences([6, 9])
    expected = [
        plain_logprobs(model, [s], t)[0] for s, t in zip(sequences, (0.5, 1.3), strict=True)
    ]
    temperature = torch.tensor([0.5] * 6 + [1.3] * 9, dtype=torch.float64)
    found, _ = PackedPolicy(model)(*pack(sequences), temperature)
    assert torch.allclose(found, torch.cat(expected), atol=1e-12)


def test_a_temperature_that_was_rounded_to_bf16_is_refused():
    policy = PackedPolicy(make_causal_model())
    with pytest.raises(ValueError, match="cast_forward_inputs=False"):
        policy(*pack(make_sequences([6])), torch.full((6,), 0.7).bfloat16())


def test_logprobs_are_fp32_with_a_bf16_trunk():
    policy = PackedPolicy(make_causal_model(dtype=torch.bfloat16))
    logprobs, entropy = policy(*pack(make_sequences([6, 9])), with_entropy=True)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # bf16 logits would leave 8 bits of each logprob.
    assert (logprobs != logprobs.bfloat16().float()).any()


def test_activation_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        model = make_causal_model(dtype=torch.float64)
        if checkpointing:
            checkpoint_activations(model)
        policy = PackedPolicy(model).train()
        policy(*pack(make_sequences(LENGTHS, shared=4)))[0].sum().backward()
        found.append(gradients(model))
    assert relative(found[1], found[0]) <= 1e-12


def test_a_filler_reaches_every_parameter_with_a_gradient_of_zero():
    model = make_causal_model()
    nothing = torch.zeros(2, dtype=torch.bool)
    logprobs, _ = PackedPolicy(model)(
        torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]), positions_mask=nothing
    )
    logprobs.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_sliding_windows_are_kept():
    model = make_causal_model(
        "qwen2", torch.float64, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    assert "sliding_attention" in model.config.layer_types
    sequences = make_sequences([9, 12, 3])
    expected, _ = plain_logprobs(model, sequences)
    assert torch.allclose(PackedPolicy(model)(*pack(sequences))[0], expected, atol=1e-12)


def test_without_bounds_the_tokens_are_one_sequence():
    policy, (ids,) = PackedPolicy(make_causal_model()), make_sequences([9])
    expected, _ = policy(*pack([ids]))
    assert torch.equal(policy(ids)[0], expected)
    mask = torch.arange(9) > 4
    assert torch.equal(policy(ids, positions_mask=mask)[0], torch.where(mask, expected, 0.0))


def test_predicted_positions_leave_out_first_tokens():
    cu_seqlens = torch.tensor([0, 3, 3, 5])
    assert predicted_positions(PackedLayout(cu_seqlens)).tolist() == [1, 2, 4]
    mask = torch.tensor([True, False, True, True, True])
    assert predicted_positions(PackedLayout(cu_seqlens), mask).tolist() == [2, 4]


def test_models_that_packing_would_get_wrong_are_refused():
    both = make_causal_model()
    both.config.final_logit_softcapping, both.config.logit_scale = 30.0, 0.5
    with pytest.raises(ConfigError, match="sets both"):
        PackedPolicy(both)
    recurrent = make_causal_model()
    recurrent.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        PackedPolicy(recurrent)
    biased = make_causal_model(tie_word_embeddings=False)
    biased.set_output_embeddings(nn.Linear(32, VOCAB, bias=True))
    with pytest.raises(ConfigError, match="linear head without bias"):
        PackedPolicy(biased)


def assert_agrees_to_fp64(model, sequences):
    expected, _ = plain_logprobs(model, sequences)
    expected.sum().backward()
    expected_gradients = gradients(model)
    found, _ = PackedPolicy(model)(*pack(sequences))
    found.sum().backward()
    assert torch.allclose(found, expected, atol=1e-12)
    assert relative(gradients(model), expected_gradients) <= 1e-12


def test_absolute_positions_work_too_and_a_model_all_in_fp64_agrees_to_fp64():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).double().eval()
    assert_agrees_to_fp64(model, make_sequences([9, 12, 3, 8], shared=2))


CAPS = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16}


@pytest.mark.parametrize("lengths", [(9, 12, 3, 8), (11,)])
@pytest.mark.parametrize(("kind", "settings"), [("gpt_oss", {}), ("gemma2", CAPS)])
def test_caps_and_sinks_of_attention_are_those_of_transformers(kind, settings, lengths):
    sizes = {"num_attention_heads": 4, "sliding_window": 5, **settings}
    model = make_model_of(kind, **sizes).double()
    model.set_experts_implementation("eager")
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.data.normal_(generator=torch.Generator().manual_seed(0))
    assert model.config._attn_implementation == "eager"
    with AllInFp64():
        assert_agrees_to_fp64(model, make_sequences(lengths, shared=6))


def test_biases_of_positions_are_refused_by_name():
    tokens = torch.zeros(1, 2, 5, 8)
    layout = PackedLayout(torch.tensor([0, 2, 5]))
    with pytest.raises(ConfigError, match="Linear has a `position_bias`"):
        packed_attention_forward(
            nn.Linear(1, 1), tokens, tokens, tokens, None, packing=layout, position_bias=tokens
        )


FORMS = [
    ("cohere", {"logit_scale": 0.3}),
    ("granite", {"logits_scaling": 6.0}),
    ("hyperclovax", {"logits_scaling": 0.3}),  # which multiplies by it
    ("minicpm3", {"hidden_size": 128, "dim_model_base": 32}),  # which computes it
    ("nanochat", {"final_logit_softcapping": 1.0}),
]


@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_logits_are_scaled_and_capped_as_the_model_does(kind, settings):
    model = make_model_of(kind, **settings).double()
    sequences = make_sequences([9, 12, 3, 8], shared=2)
    expected = plain_logprobs(model, sequences, 0.7)
    sum(t.sum() for t in expected).backward()
    expected_gradients = gradients(model)
    policy = PackedPolicy(model)
    assert policy.logit_form != LogitForm()
    cu_seqlens = pack(sequences)[1]
    temperatures = torch.full((int(cu_seqlens[-1]),), 0.7, dtype=torch.float64)
    for temperature in (0.7, temperatures):
        found = policy(*pack(sequences), temperature, with_entropy=True)
        for left, right in zip(found, expected, strict=True):
            assert torch.allclose(left, right, atol=1e-7)  # norms compute in fp32
        sum(t.sum() for t in found).backward()
        assert relative(gradients(model), expected_gradients) <= 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_its_flops_are_those_of_the_matrix_products_and_of_half_of_the_attention(tied):
    policy = PackedPolicy(make_lm(tied))
    ids, bounds = pack(make_sequences([6, 9]))
    wanted = torch.ones(15, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        policy(ids, bounds, positions_mask=wanted)[0].sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    config = policy.model.config
    width = config.num_attention_heads * config.head_dim
    attention = 6 * config.num_hidden_layers * width * (6 * 6 + 9 * 9)
    norms = 6 * 15 * sum(p.numel() for p in policy.parameters() if p.ndim == 1)
    assert policy.flops([6, 9], 13) == products + attention + norms


# ---- norms --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("trains_weight", [True, False])
def test_on_a_cpu_values_are_the_same_bits_and_gradients_are_the_same(trains_weight):
    norm = Qwen3RMSNorm(32).requires_grad_(trains_weight)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    rows = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = [rows, norm.weight][: 1 + trains_weight]
    expected = norm(rows)
    wanted = torch.autograd.grad((expected**3).sum(), inputs)
    fuse_norms(norm)
    found = norm(rows)
    assert type(found.grad_fn).__name__ == "_NormBackward"
    assert torch.equal(found, expected)
    for mine, theirs in zip(torch.autograd.grad((found**3).sum(), inputs), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    half = norm.to(torch.bfloat16)
    assert torch.equal(half(rows.bfloat16()), type(half).forward(half, rows.bfloat16()))


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


# ---- head ---------------------------------------------------------------------------------------

ROWS, HIDDEN, HEAD_VOCAB = 13, 6, 17


def head_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(HEAD_VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, HEAD_VOCAB, (ROWS,), generator=generator)
    temperature = 0.5 + torch.rand(ROWS, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, temperature


def reference(hidden, weight, targets, temperature, cap=None):
    logits = hidden.double() @ weight.double().t()
    logits = logits if cap is None else cap * (logits / cap).tanh()
    log_softmax = (logits / temperature.double().unsqueeze(1)).log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


@pytest.mark.parametrize("cap", [None, 1.5, 30.0])
@pytest.mark.parametrize("rows", [1, 4, 12, 13, 100])
def test_values_and_gradients_equal_those_of_all_logits_at_once(rows, cap):
    hidden, weight, targets, temperature = head_inputs()
    expected = reference(hidden, weight, targets, temperature, cap)
    most = rows * HEAD_VOCAB
    found = head_logprobs(hidden, weight, targets, temperature, True, most, cap=cap)
    probe = torch.randn(2, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for logprobs, entropy in (expected, found):
        loss = (probe[0] * logprobs + probe[1] * entropy).sum()
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    for left, right in zip((*expected, *gradients[0]), (*found, *gradients[1]), strict=True):
        assert torch.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("max_logits", [3 * HEAD_VOCAB, 1000])
def test_the_gradient_is_that_of_finite_differences(with_entropy, max_logits, cap):
    hidden, weight, targets, temperature = head_inputs()

    def function(hidden, weight):
        logprobs, entropy = head_logprobs(
            hidden, weight, targets, temperature.double(), with_entropy, max_logits, cap=cap
        )
        return (logprobs, entropy) if with_entropy else logprobs

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("rows", [4, 100])
def test_a_capped_head_in_fp32_has_the_gradient_of_fp64_also_where_logits_are_at_the_cap(rows):
    found, expected = head_inputs(torch.float32), head_inputs()
    for inputs in (found, expected):
        inputs[1].data *= 4
    logprobs, entropy = head_logprobs(*found, True, rows * HEAD_VOCAB, cap=3.0)
    exact = reference(*expected, 3.0)
    for each in ((logprobs, entropy), exact):
        sum(t.sum() for t in each).backward()
    assert torch.allclose(logprobs.double(), exact[0], atol=1e-5)
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        assert ((mine.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 1e-5


class LargestVocabTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor with a vocabulary axis had."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == HEAD_VOCAB:
                self.rows = max(self.rows, tensor.numel() // HEAD_VOCAB)
        return out


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_more_than_one_chunk_of_logits_exists_forward_or_backward(with_entropy):
    hidden, weight, targets, temperature = head_inputs()
    # The weight's own gradient is [vocab, hidden]; its transpose would be mistaken for logits.
    with LargestVocabTensor() as spy:
        logprobs, entropy = head_logprobs(
            hidden, weight.detach(), targets, temperature, with_entropy, 4 * HEAD_VOCAB
        )
        (logprobs.sum() + (entropy.sum() if with_entropy else 0.0)).backward()
    assert 0 < spy.rows <= max(4, HIDDEN)
    with LargestVocabTensor() as spy:
        head_logprobs(hidden, weight.detach(), targets, temperature, with_entropy, 1000)
    assert spy.rows == ROWS


def test_logits_are_fp32_where_hidden_states_and_weights_are_bf16():
    hidden, weight, targets, temperature = head_inputs(torch.bfloat16)
    logprobs, entropy = head_logprobs(hidden, weight, targets, temperature, True)
    expected, expected_entropy = reference(hidden, weight, targets, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # Products and sums of bf16 numbers in fp32 are right to 1e-5; in bf16 they are not to 1e-2.
    assert torch.allclose(logprobs.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), expected_entropy, atol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_no_rows_at_all_give_gradients_of_zero():
    hidden, weight, targets, temperature = head_inputs()
    nothing = torch.zeros(0, dtype=torch.int64)
    logprobs, _ = head_logprobs(
        hidden[nothing], weight, targets[nothing], temperature[nothing], False
    )
    logprobs.sum().backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_a_chunk_is_at_least_one_row():
    assert chunk_rows(1000, 10) == 1
    assert chunk_rows(1000, 5500) == 5


@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_rounds_what_comes_in_and_no_logits(rows, inside):
    _, weight, targets, temperature = head_inputs(torch.float32)
    hidden = head_inputs(torch.bfloat16)[0]
    rounded = (hidden.detach().requires_grad_(), weight.detach().bfloat16().requires_grad_())
    expected = head_logprobs(*rounded, targets, temperature, True, rows * HEAD_VOCAB)
    sum(t.sum() for t in expected).backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logprobs(hidden, weight, targets, temperature, True, rows * HEAD_VOCAB)
        if inside:  # where a step has several micro-batches, the first ones' backward is
            sum(t.sum() for t in found).backward()
    if not inside:
        sum(t.sum() for t in found).backward()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(hidden.grad, rounded[0].grad)
    assert torch.equal(weight.grad, rounded[1].grad.float())
