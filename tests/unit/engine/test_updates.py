"""New weights are checked as a whole before any is written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_grpo.engine.model import load_model
from lightning_grpo.engine.requests import WeightUpdateError
from lightning_grpo.engine.updates import ModelWeights
from lightning_grpo.naming import CheckpointNames
from lightning_grpo.policy.load import without_bars
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
    new = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    weights.writer(CheckpointNames(model).of(new), complete=True)()
    assert all(bool((p == 1).all()) for p in model.parameters())
    assert bool((model.get_buffer(router) == 3).all())


KINDS = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_neox", "granitemoe", "hrm_text", "aria_text"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_s_tensors_come_in_any_order_and_one_by_one(kind: str) -> None:
    source, model = make_model_of(kind, seed=1), make_model_of(kind)
    weights = ModelWeights(model)
    given = list(CheckpointNames(source).of(source.state_dict()).items())
    random.Random(0).shuffle(given)
    weights.check(dict(given), complete=True)
    for name, tensor in given:
        weights.writer({name: tensor})()
    expected = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_one_expert_alone_changes_nothing_else() -> None:
    model = make_model_of("qwen3_moe")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = ModelWeights(model)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights.writer({name: torch.full((24, 32), 7.0)})()
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    before[fused][2, 24:] = 7.0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(WeightUpdateError, match="weights of the model are missing"):
        weights.check({name: torch.zeros(24, 32)}, complete=True)


@pytest.mark.parametrize(
    ("kind", "held", "said"),
    [
        ("qwen3_moe", "mlp.experts.gate_up_proj", r"holds it as '.*experts\.0\..*' and 7 more"),
        ("mixtral", "0.mlp.gate.weight", r"holds it as '.*block_sparse_moe\.gate\.weight'"),
    ],
)
def test_names_that_only_memory_knows_are_refused_with_the_checkpoint_s(
    kind: str, held: str, said: str
) -> None:
    model = make_model_of(kind)
    weights = ModelWeights(model)
    name = next(name for name in model.state_dict() if name.endswith(held))
    with pytest.raises(WeightUpdateError, match=f"no weight .*{held}.* {said}"):
        weights.writer({name: model.state_dict()[name]})


@pytest.mark.parametrize("kind", ["qwen3_moe", "hrm_text"])
@pytest.mark.parametrize("as_checkpoint", [True, False])
def test_a_folder_in_either_layout_is_read(kind: str, as_checkpoint: bool, tmp_path: Path) -> None:
    source, model = make_model_of(kind, seed=1), make_model_of(kind)
    with without_bars():
        source.save_pretrained(tmp_path, save_original_format=as_checkpoint)
        weights = ModelWeights(model)
        weights.writer(weights.read_folder(str(tmp_path)), complete=True)()
    expected = source.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with without_bars():
        make_model_of("qwen3").save_pretrained(tmp_path)
        weights = ModelWeights(make_model_of("qwen3_moe"))
        with pytest.raises(WeightUpdateError, match=r"the model has no weight|missing"):
            weights.writer(weights.read_folder(str(tmp_path)), complete=True)
