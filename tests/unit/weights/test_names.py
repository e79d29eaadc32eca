import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from lightning_grpo.weights.gather import (
    checkpoint_name,
    checkpoint_names,
    gather_weights,
    make_buckets,
)


def tiny(tied=True):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


class Wrapper(nn.Module):
    def __init__(self, inner, name):
        super().__init__()
        self.add_module(name, inner)
        self.value_head = nn.Linear(2, 2)


def saved_names(model, folder):
    # Its progress bar would leave a thread behind.
    disable_progress_bar()
    model.save_pretrained(folder)
    enable_progress_bar()
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_that_save_pretrained_writes(tmp_path, tied):
    model = tiny(tied)
    gathered = gather_weights(model)
    assert set(gathered) == saved_names(model, tmp_path)
    assert ("lm_head.weight" in gathered) is not tied


@pytest.mark.parametrize("wrapping", [["model"], ["policy", "model"], ["module"]])
def test_wrappers_leave_no_trace_and_their_own_weights_stay_behind(tmp_path, wrapping):
    model = tiny()
    expected = saved_names(model, tmp_path)
    wrapped = model
    for name in reversed(wrapping):
        wrapped = Wrapper(wrapped, name)
    assert set(gather_weights(wrapped)) == expected


def test_compiled_and_checkpointed_layers_have_their_plain_names(tmp_path):
    model = tiny()
    expected = saved_names(model, tmp_path)
    inner = model.model.layers[0]
    compiled = nn.Module()
    compiled.add_module("_orig_mod", inner)
    model.model.layers[0] = compiled
    assert set(gather_weights(Wrapper(model, "model"))) == expected
    name = "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight"
    assert checkpoint_name(name) == "model.layers.0.mlp.up_proj.weight"


def test_a_tied_head_is_left_out_and_a_free_one_kept():
    names = ["model.embed.weight", "lm_head.weight"]
    assert checkpoint_names(names, "", tied=True) == {names[0]: names[0]}
    assert set(checkpoint_names(names, "", tied=False)) == set(names)


def test_the_copy_shares_no_memory_with_the_model_and_keeps_its_values():
    model = tiny()
    gathered = gather_weights(model)
    before = {name: tensor.clone() for name, tensor in gathered.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, tensor in gathered.items():
        assert torch.equal(tensor, before[name])


def test_what_was_gathered_is_sent_without_another_copy():
    gathered = gather_weights(tiny(), torch.bfloat16)
    (bucket,) = make_buckets(gathered, 1 << 30)
    assert list(gathered) == list(bucket.names)
    assert bucket.flat.data_ptr() == next(iter(gathered.values())).data_ptr()


def test_weights_are_cast_to_the_serving_dtype():
    gathered = gather_weights(tiny(), torch.bfloat16)
    assert {tensor.dtype for tensor in gathered.values()} == {torch.bfloat16}


def test_a_rank_that_keeps_nothing_gets_nothing():
    assert gather_weights(tiny(), keep=False) == {}


def test_a_plain_module_keeps_its_names():
    assert set(gather_weights(nn.Linear(2, 3))) == {"weight", "bias"}
