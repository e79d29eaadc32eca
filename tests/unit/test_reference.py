"""The reference of a KL penalty, held beside the module."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_grpo.algorithm.kl import KLPenalty
from lightning_grpo.errors import ConfigError
from lightning_grpo.module import ReferencePolicy
from tests.fakes.loops import make_module
from tests.fakes.tiny_model import make_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=1, hidden_size=32)


def test_a_reference_is_no_part_of_the_module_and_loaded_once(folder):
    module = make_module(folder, kl=KLPenalty(0.1))
    module.configure_model()
    before = {name: p.shape for name, p in module.state_dict().items()}
    with module._reference.on(module.policy, CPU) as reference:
        assert reference is not module.policy
    with module._reference.on(module.policy, CPU) as again:
        assert again is reference
    assert not any(p.requires_grad for p in reference.parameters())
    assert {name: p.shape for name, p in module.state_dict().items()} == before
    with make_module(folder)._reference.on(module.policy, CPU) as none:
        assert none is None


def test_another_model_may_be_the_reference(folder, tmp_path):
    other = make_tiny_model(tmp_path, num_layers=1, hidden_size=32, seed=5)
    held = ReferencePolicy(KLPenalty(0.1, reference=str(other), offload=True), str(folder), {})
    module = make_module(folder)
    module.configure_model()
    with held.on(module.policy, CPU) as reference:  # on a CPU there is nowhere to go from
        same = zip(reference.parameters(), module.policy.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in same)


def swapped(other):
    """The tokenizer with other texts for the same ids."""
    path = other / "tokenizer.json"
    whole = json.loads(path.read_text())
    words, ids = zip(*whole["model"]["vocab"].items(), strict=True)
    whole["model"]["vocab"] = dict(zip(words, reversed(ids), strict=True))
    whole["model"]["merges"] = []
    path.write_text(json.dumps(whole))


def weights_alone(other):
    for file in other.glob("tokenizer*"):
        file.unlink()


def test_a_reference_of_other_tokens_is_refused_before_servers_are_started(folder, tmp_path):
    def check(name, change=lambda other: None, **settings):
        other = make_tiny_model(tmp_path / name, num_layers=1, hidden_size=32, **settings)
        change(other)
        make_module(folder, kl=KLPenalty(0.1, reference=str(other))).check_model()

    check("same", seed=5)
    check("padded to more rows", vocab=640)
    check("padded to fewer", vocab=320)
    check("weights", weights_alone)
    with pytest.raises(ConfigError, match=r"`kl.reference` .* of 300 rows, too few for"):
        check("few", vocab=300)
    with pytest.raises(
        ConfigError, match=r"`kl.reference` must have the policy's tokenizer, .* is"
    ):
        check("swapped", swapped)
