"""The reference of a KL penalty, held beside the module."""

from __future__ import annotations

import pytest
import torch

from lightning_grpo.algorithm.kl import KLPenalty
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
