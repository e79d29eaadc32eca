import pytest
import torch
from torch import nn

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.load import load_policy, load_tokenizer
from tests.fakes.causal_models import make_causal_model
from tests.fakes.tiny_model import make_tiny_model


def test_a_folder_loads_in_fp32_with_packed_attention_and_no_dropout(tmp_path):
    model = make_causal_model(attention_dropout=0.5, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))
    assert policy.config._attn_implementation == "packed"
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.training
    assert not policy.config.use_cache
    assert all(m.p == 0.0 for m in policy.modules() if isinstance(m, nn.Dropout))


def test_from_pretrained_gets_the_model_arguments(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), model_kwargs={"attn_implementation": "eager"})
    assert policy.config._attn_implementation == "eager"


def test_a_meta_policy_has_shapes_alone(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), meta=True, dtype=torch.bfloat16)
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert policy.config._attn_implementation == "packed"


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_a_folder_that_is_missing_or_holds_no_model_is_a_config_error(load, tmp_path):
    with pytest.raises(ConfigError, match="`model` must be a folder that exists"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(str(tmp_path))


def test_a_folder_without_weights_is_a_config_error(tmp_path):
    make_causal_model().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="causal language model"):
        load_policy(str(tmp_path))


def test_an_argument_that_the_model_does_not_take_is_a_config_error(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tourch_dtype"):
        load_policy(str(tmp_path), model_kwargs={"tourch_dtype": "float32"})


def test_a_folder_without_tokenizer_is_a_config_error(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_comes_back_from_its_folder(tmp_path):
    tokenizer = load_tokenizer(str(make_tiny_model(tmp_path)))
    assert tokenizer.decode(tokenizer("3 + 4")["input_ids"]) == "3 + 4"
