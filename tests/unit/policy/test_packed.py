import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
)

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.attention import PackedLayout
from lightning_grpo.policy.load import checkpoint_activations
from lightning_grpo.policy.packed import PackedPolicy, predicted_positions
from tests.fakes.causal_models import (
    ARCHITECTURES,
    VOCAB,
    make_causal_model,
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
    capped = make_causal_model()
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        PackedPolicy(capped)
    recurrent = make_causal_model()
    recurrent.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        PackedPolicy(recurrent)
    biased = make_causal_model(tie_word_embeddings=False)
    biased.set_output_embeddings(nn.Linear(32, VOCAB, bias=True))
    with pytest.raises(ConfigError, match="linear head without bias"):
        PackedPolicy(biased)


def test_absolute_positions_work_too_and_a_model_all_in_fp64_agrees_to_fp64():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).double().eval()
    sequences = make_sequences([9, 12, 3, 8], shared=2)
    expected, _ = plain_logprobs(model, sequences)
    expected.sum().backward()
    expected_gradients = gradients(model)
    found, _ = PackedPolicy(model)(*pack(sequences))
    found.sum().backward()
    assert torch.allclose(found, expected, atol=1e-12)
    assert relative(gradients(model), expected_gradients) <= 1e-12


@pytest.mark.parametrize("name", ["s_aux", "softcap"])
def test_attention_that_is_more_than_causal_is_refused_by_name(name):
    settings = {"s_aux": ("gpt_oss", {}), "softcap": ("gemma2", {"final_logit_softcapping": None})}
    kind, more = settings[name]
    small = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    config = CONFIG_MAPPING[kind](vocab_size=VOCAB, **small, **heads, **more)
    policy = PackedPolicy(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    with pytest.raises(ConfigError, match=f"has a `{name}`"):
        policy(*pack(make_sequences([6, 9])))


def test_a_scale_of_the_logits_that_a_config_computes_is_refused_too():
    class Scaled(Qwen3Config):
        @property
        def logits_scaling(self):  # as MiniCPM3's does
            return self.hidden_size / 16

    model = make_causal_model()
    model.config = Scaled(**model.config.to_dict())
    with pytest.raises(ConfigError, match="logits_scaling"):
        PackedPolicy(model)


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
