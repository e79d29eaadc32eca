import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_grpo.policy.load import export_policy, load_policy, load_tokenizer
from lightning_grpo.policy.packed import PackedPolicy
from tests.fakes.causal_models import pack
from tests.fakes.tiny_model import make_tiny_model

IDS = torch.tensor([[5, 9, 30, 2, 77, 15]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_transformers_loads_an_exported_policy_with_equal_logits(folder, tmp_path):
    wrapped = PackedPolicy(load_policy(str(folder)))
    with torch.no_grad():
        wrapped.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    out = export_policy(wrapped.model, load_tokenizer(str(folder)), tmp_path / "a" / "out")

    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert loaded.config._attn_implementation == "sdpa"
    logits = loaded(IDS).logits[0]
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, IDS[0, 1:].unsqueeze(1)).squeeze(1)
    found, _ = wrapped(*pack([IDS[0]]))
    assert torch.allclose(found[1:], expected, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"] is True
    assert "packed" not in json.dumps(config)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("9 * 5")["input_ids"]) == "9 * 5"


def test_the_model_goes_on_as_it_was(folder, tmp_path):
    model = load_policy(str(folder))
    export_policy(model, None, tmp_path / "out")
    assert not model.config.use_cache
    assert model.config._attn_implementation == "packed"


def test_given_tensors_are_written_in_the_place_of_the_models_own(folder, tmp_path):
    model = load_policy(str(folder))
    state = {name: value * 2 for name, value in model.state_dict().items()}
    out = export_policy(model, None, tmp_path / "out", state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_an_older_folder_is_replaced_whole_and_nothing_else_is_left(folder, tmp_path):
    model = load_policy(str(folder))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.bin").touch()
    export_policy(model, None, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale.bin").exists()


class BrokenTokenizer:
    def save_pretrained(self, folder):
        raise OSError("no space left on device")


def test_a_failed_export_leaves_the_older_folder_and_no_rest(folder, tmp_path):
    model = load_policy(str(folder))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older").touch()
    with pytest.raises(OSError, match="no space"):
        export_policy(model, BrokenTokenizer(), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "older"]
    assert not model.config.use_cache
