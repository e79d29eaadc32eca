"""New weights are checked as a whole before any is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_grpo.engine.model import load_model
from lightning_grpo.engine.requests import WeightUpdateError
from lightning_grpo.engine.updates import ModelWeights
from tests.fakes.causal_models import make_model_of
from tests.fakes.tiny_model import make_tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_read_and_written_whole(tmp_path: Path, tied: bool) -> None:
    folders = [
        make_tiny_model(tmp_path / str(seed), seed=seed, tie_word_embeddings=tied)
        for seed in (0, 1)
    ]
    model = load_model(str(folders[0]))
    weights = ModelWeights(model)
    tensors = weights.read_folder(str(folders[1]))
    weights.writer(tensors, complete=True)()
    expected = load_model(str(folders[1])).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_tied_head_counts_as_its_embedding(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    weights = ModelWeights(load_model(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    weights.check(tensors, complete=True)
    renamed = dict(tensors)
    renamed["lm_head.weight"] = renamed.pop("model.embed_tokens.weight")
    weights.check(renamed, complete=True)


def test_one_wrong_tensor_leaves_all_weights(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    model = load_model(str(folder))
    weights = ModelWeights(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tensors = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    for wrong, word in (
        ({"model.norm.weight": torch.zeros(3)}, "model.norm.weight"),
        ({"model.norm.bias": torch.zeros(64)}, "model.norm.bias"),
    ):
        with pytest.raises(WeightUpdateError, match=word):
            weights.writer(tensors | wrong)
    del tensors["model.norm.weight"]
    with pytest.raises(WeightUpdateError, match=r"missing, 'model\.norm\.weight'"):
        weights.writer(tensors, complete=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_buffer_that_nobody_trains_is_not_missed_and_stays() -> None:
    model = make_model_of("glm4_moe")
    weights = ModelWeights(model)
    router = next(name for name in model.state_dict() if name.endswith("e_score_correction_bias"))
    model.get_buffer(router).fill_(3.0)
    weights.writer({n: torch.ones_like(p) for n, p in model.named_parameters()}, complete=True)()
    assert all(bool((p == 1).all()) for p in model.parameters())
    assert bool((model.get_buffer(router) == 3).all())
