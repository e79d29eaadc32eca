"""FSDP2Strategy on real gloo ranks: the same numbers as ddp and as one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from lightning_grpo.strategies.fsdp2 import FSDP2Strategy, is_sharded
from lightning_grpo.weights.gather import gather_weights
from tests.fakes.ranks import run_ranks
from tests.fakes.tiny_lm import MetaModule, Steps, TinyModule, global_batch, make_lm, make_trainer


def fit(strategy, world_size: int, folder, module=None, steps=4, ckpt_path=None, **kwargs):
    module = module or TinyModule()
    trainer = make_trainer(strategy, folder, world_size, max_steps=steps, **kwargs)
    trainer.fit(module, Steps(100), ckpt_path=ckpt_path)
    return module, trainer


def train_every_way(world_size: int, folder: str) -> dict[str, tuple[list[float], list[float]]]:
    ways = {
        "plain": "ddp" if world_size > 1 else "auto",
        "by name": "fsdp2",
        "no reshard": FSDP2Strategy(reshard_after_forward=False),
        "root alone": FSDP2Strategy(blocks=[]),
    }
    results = {}
    for name, strategy in ways.items():
        module, _ = fit(strategy, world_size, folder)
        assert is_sharded(module.policy) == (name != "plain")
        results[name] = (module.losses, module.norms)
    module, _ = fit("fsdp2", world_size, folder, TinyModule(checkpointing=True))
    results["checkpointing"] = (module.losses, module.norms)
    return results


def test_losses_and_norms_agree_between_one_process_ddp_and_fsdp2(tmp_path):
    (single,) = run_ranks(train_every_way, 1, 1, str(tmp_path))
    ranks = run_ranks(train_every_way, 2, 2, str(tmp_path))
    expected_losses, expected_norms = (torch.tensor(v) for v in single["plain"])
    assert expected_losses[0] > expected_losses[-1] > 0
    assert len(expected_losses) == 4
    for results in (single, *ranks):
        assert len(results) == 5
        for losses, norms in results.values():
            assert torch.allclose(torch.tensor(losses), expected_losses, atol=1e-5)
            assert torch.allclose(torch.tensor(norms), expected_norms, atol=1e-4)


def train_alone(folder: str) -> tuple[list[float], list[float]]:
    module, _ = fit("auto", 1, folder, steps=4)
    return module.losses, module.norms


def train_hybrid(folder: str, shard_size: int) -> tuple[list[float], list[float], tuple[int, ...]]:
    """Four steps, what servers would be sent, and a checkpoint."""
    module, trainer = fit(FSDP2Strategy(shard_size=shard_size), 4, folder, steps=4)
    trainer.save_checkpoint(Path(folder) / f"shards_{shard_size}")
    whole = {
        name.removeprefix("model."): parameter.full_tensor()
        for name, parameter in module.policy.named_parameters()
    }
    sent = gather_weights(module.policy)
    assert sent.keys() <= whole.keys()
    assert all(torch.equal(sent[name], whole[name]) for name in sent)
    held = next(module.policy.parameters())
    return module.losses, module.norms, tuple(held.device_mesh.shape)


def check_hybrid(folder: str, shard_size: int, mesh: tuple[int, ...]) -> None:
    ((losses, norms),) = run_ranks(train_alone, 1, folder)
    for found_losses, found_norms, shape in run_ranks(train_hybrid, 4, folder, shard_size):
        assert torch.allclose(torch.tensor(found_losses), torch.tensor(losses), atol=1e-6)
        assert torch.allclose(torch.tensor(found_norms), torch.tensor(norms), atol=1e-6)
        assert shape == mesh


def test_shards_within_rows_of_ranks_give_the_numbers_of_one_process(tmp_path):
    check_hybrid(str(tmp_path), 2, (2, 2))


def resume_hybrid(world_size: int, folder: str, saved: int, shard_size: int | None) -> list[float]:
    path = Path(folder) / f"shards_{saved}"
    strategy = FSDP2Strategy(shard_size=shard_size)
    return fit(strategy, world_size, folder, steps=6, ckpt_path=path)[0].losses


@pytest.mark.slow
def test_checkpoints_of_rows_of_ranks_resume_in_every_layout(tmp_path):
    for shard_size, mesh in {1: (4, 1), 2: (2, 2), 4: (4,)}.items():
        check_hybrid(str(tmp_path), shard_size, mesh)
    layouts = [(4, 2, 2), (4, 4, 2), (4, 1, 4), (4, 2, None), (2, 2, None), (1, 2, 1)]
    further = [
        torch.tensor(run_ranks(resume_hybrid, ranks, ranks, str(tmp_path), saved, shard_size))
        for ranks, saved, shard_size in layouts
    ]
    for losses in further:
        assert torch.allclose(losses, further[0][:1].expand_as(losses), atol=1e-6)


def materialize(folder: str, tied: bool) -> dict[str, object]:
    module = MetaModule(folder, tied)
    trainer = make_trainer("fsdp2", folder, 2, max_steps=0)
    trainer.fit(module, Steps(4))
    with torch.no_grad():
        logits = module.policy(global_batch(0))
    return {
        "meta": module.was_meta,
        "logits": logits,
        "sharded": [type(p).__name__ for p in module.policy.model.model.layers.parameters()],
        "tied": module.policy.model.lm_head.weight is module.policy.model.model.embed_tokens.weight,
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_built_on_meta_gives_the_logits_of_from_pretrained_exactly(tmp_path, tied):
    disable_progress_bar()  # its monitor thread would outlive the test
    model = make_lm(tied, seed=7)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=global_batch(0), use_cache=False).logits
    for result in run_ranks(materialize, 2, str(tmp_path), tied):
        assert result["meta"]
        assert torch.equal(result["logits"], expected)
        assert set(result["sharded"]) == {"DTensor"}
        assert result["tied"] == tied


def save(world_size: int, folder: str) -> list[float]:
    """Three steps, a checkpoint of each kind, and three steps more."""
    for kind in (True, False):
        strategy = FSDP2Strategy(save_distributed_checkpoint=kind)
        module, trainer = fit(strategy, world_size, folder, steps=3)
        trainer.save_checkpoint(Path(folder) / ("sharded" if kind else "full"))
    module, _ = fit("fsdp2", world_size, folder, steps=6)
    return module.losses[3:]


def resume(world_size: int, folder: str) -> list[list[float]]:
    losses = []
    for kind in ("sharded", "full"):
        module, _ = fit("fsdp2", world_size, folder, steps=6, ckpt_path=Path(folder) / kind)
        losses.append(module.losses)
    if world_size > 1:
        module, _ = fit("ddp", world_size, folder, steps=6, ckpt_path=Path(folder) / "full")
        losses.append(module.losses)
    return losses


def test_checkpoints_resume_on_the_same_and_on_another_number_of_ranks(tmp_path):
    expected, _ = run_ranks(save, 2, 2, str(tmp_path))
    assert len(expected) == 3
    (single,) = run_ranks(resume, 1, 1, str(tmp_path))
    ranks = run_ranks(resume, 2, 2, str(tmp_path))
    found = torch.tensor([*single, *ranks[0], *ranks[1]])
    assert found.shape == (8, 3)
    assert torch.allclose(found, torch.tensor(expected).expand_as(found), atol=1e-5)


def test_a_full_checkpoint_holds_plain_names_and_loads_safely(tmp_path):
    run_ranks(save, 1, 1, str(tmp_path))
    state = torch.load(tmp_path / "full", weights_only=True)
    assert "policy.model.lm_head.weight" in state["state_dict"]
    assert state["global_step"] == 3


class SavesAtStart(TinyModule):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_start(self) -> None:
        self.trainer.save_checkpoint(self.path)


def save_before_the_first_step(folder: str) -> list[list[float]]:
    losses = [fit("fsdp2", 1, folder)[0].losses]
    for kind in (True, False):
        path = Path(folder) / f"at_start_{kind}"
        strategy = FSDP2Strategy(save_distributed_checkpoint=kind)
        losses.append(fit(strategy, 1, folder, SavesAtStart(path))[0].losses)
        losses.append(fit("fsdp2", 1, folder, ckpt_path=path)[0].losses)
    return losses


def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path):
    (losses,) = run_ranks(save_before_the_first_step, 1, str(tmp_path))
    assert len(losses) == 5
    assert all(each == losses[0] for each in losses)
