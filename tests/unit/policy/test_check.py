"""Models that can't be trained are refused by name, before there are weights or servers."""

import random

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from lightning_grpo.certify.tiny import tiny_config, tiny_model
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.check import (
    check_architecture,
    check_rows_apart,
    check_splittable,
    check_two_passes,
)
from lightning_grpo.policy.load import checkpoint_activations, load_policy
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.packed import PackedPolicy
from tests.fakes.causal_models import (
    make_causal_model,
    make_model_of,
    make_sequences,
    pack,
    plain_logprobs,
)
from tests.fakes.faulty_parts import SeesTheNextRow, StatesLeak

NOISY = [
    ("seed_oss", {}),
    ("starcoder2", {"residual_dropout": 0.2, "embedding_dropout": 0.2}),
    ("mixtral", {"router_jitter_noise": 0.1}),
    ("phimoe", {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1}),  # and samples its routes
    ("opt", {"dropout": 0.3, "layerdrop": 0.5}),
    ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3}),
]


def test_a_model_whose_rows_ranks_can_t_compute_together_is_refused_with_what_works():
    model = make_causal_model(num_attention_heads=6, num_key_value_heads=2)
    for works in (1, 2, 3, 6):
        check_splittable(model, works)
    with pytest.raises(ConfigError, match=r"6 query heads of Qwen3.*, got 4\. 3 works; 1"):
        check_splittable(model, 4)
    hybrid = tiny_model(tiny_config(CONFIG_MAPPING["qwen3_next"]()))
    with pytest.raises(ConfigError, match=r"must be 1 for Qwen3NextForCausalLM: its recurrent"):
        check_splittable(hybrid, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "settings"), NOISY)
def test_noise_of_training_is_off_wherever_a_model_keeps_it(
    kind, settings, checkpointing, tmp_path
):
    make_model_of(kind, **settings).save_pretrained(tmp_path)
    sequences = make_sequences([9, 12, 5])
    expected, _ = plain_logprobs(make_model_of(kind, **settings), sequences)
    policy = PackedPolicy(load_policy(str(tmp_path)))
    if checkpointing:
        checkpoint_activations(policy.model)
    for _ in range(2):
        policy.train()  # as a Trainer, or a loop of the user's, may do at any time
        found, _ = policy(*pack(sequences))
        assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    check_two_passes(policy.train())


def test_gradient_checkpointing_still_recomputes_the_blocks():
    policy = PackedPolicy(make_causal_model())
    checkpoint_activations(policy.model)
    passes = []
    policy.model.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    policy.train()(*pack(make_sequences([9])))[0].sum().backward()
    assert len(passes) == 2


class Noise(nn.Module):
    """Heeds no mode, as a module of the user's might."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, hidden):
        return hidden * (1 + 0.1 * self.draw())


@pytest.mark.parametrize(
    ("draw", "source"),
    [
        (lambda: torch.rand([]), r", which model\.layers\.1\.mlp\.act_fn \(Noise\) drew"),
        (random.random, ", not torch's"),
    ],
)
def test_noise_that_stays_is_refused_with_where_it_comes_from(draw, source):
    model = make_causal_model()
    model.model.layers[1].mlp.act_fn = Noise(draw)
    with pytest.raises(ConfigError, match=f"two passes differ by .* random numbers{source}"):
        check_two_passes(PackedPolicy(model))


@pytest.mark.parametrize(
    ("kind", "policy"), [("qwen3_5_text", StatesLeak), ("qwen2", SeesTheNextRow)]
)
def test_rows_that_see_each_other_are_refused_with_the_weights_at_hand(kind, policy):
    config = tiny_config(CONFIG_MAPPING[kind]())
    check_rows_apart(PackedPolicy(tiny_model(config)))
    with pytest.raises(ConfigError, match="whatever it is packed with, and those of Qwen"):
        check_rows_apart(policy(tiny_model(config), share_prefixes=False))


def test_weights_that_hold_nan_are_refused_before_they_are_published():
    model = make_causal_model()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ConfigError, match="must give finite logprobs"):
        check_two_passes(PackedPolicy(model))


UNTRAINABLE = [
    ("nemotron", {}, "NemotronForCausalLM doesn't pass on to it where sequences begin"),
    ("doge", {}, "DogeForCausalLM gives it a mask of its own"),
    ("gptj", {"rotary_dim": 8}, "must let transformers choose its attention"),
    ("falcon", {}, "must let transformers choose its attention"),
    ("bloom", {}, "must let transformers choose its attention"),
    ("phi", {}, "linear head without bias, PhiForCausalLM has Linear with one"),
    ("mamba", {}, "MambaForCausalLM doesn't tell these layers where sequences begin"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), UNTRAINABLE)
def test_a_model_that_packing_would_get_wrong_is_refused_by_its_config_alone(
    kind, settings, message, tmp_path
):
    make_model_of(kind, **settings).config.save_pretrained(tmp_path)  # no weights
    with pytest.raises(ConfigError, match=message):
        check_architecture(str(tmp_path))


PLAIN = ("qwen3", "gpt2", "mixtral", "deepseek_v3", "opt", "gemma3_text")
HYBRIDS = ("qwen3_next", "qwen3_5_text", "falcon_h1")
VARIANTS = ("gpt_oss", "gemma2", "cohere2", "granite", "nanochat")


@pytest.mark.parametrize("kind", [*PLAIN, *VARIANTS, *HYBRIDS])
def test_models_that_can_be_trained_pass_by_their_config_alone(kind, tmp_path):
    make_model_of(kind).config.save_pretrained(tmp_path)
    check_architecture(str(tmp_path))


def test_an_adapter_is_checked_along(tmp_path):
    make_causal_model().config.save_pretrained(tmp_path)
    check_architecture(str(tmp_path), adapt=LoRA().add_to)
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        check_architecture(str(tmp_path), adapt=LoRA(targets=("c_attn",)).add_to)


def test_a_window_that_only_the_mask_knows_of_is_kept():
    model = make_model_of("phimoe", sliding_window=4)
    sequences = make_sequences([9, 12, 3])
    expected, _ = plain_logprobs(model, sequences)
    assert torch.allclose(PackedPolicy(model)(*pack(sequences))[0], expected, atol=1e-5)


# ---- memory -------------------------------------------------------------------------------------
