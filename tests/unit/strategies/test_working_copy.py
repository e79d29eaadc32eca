"""One rank of fsdp2: passes in another dtype, gradients and weights in fp32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.strategies.fsdp2 import (
    FSDP2Strategy,
    gradient_sync,
    is_sharded,
    parallelize,
)
from lightning_grpo.strategies.working_copy import WorkingCopy, working_copies
from tests.fakes.causal_models import make_model_of, make_sequences, pack
from tests.fakes.tiny_lm import Policy, global_batch, make_lm

HALF = torch.bfloat16
MESH = ("data_parallel", "tensor_parallel")


class Tower(nn.Module):
    """Two layers that share a weight, whose activations may be computed again."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = again
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.first.weight.dtype)
        return checkpoint(self.inside, x, use_reentrant=False) if self.again else self.inside(x)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.first.weight.dtype)
        return self.second(self.first(x).relu())


def expected_gradients(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """As a model in half precision has them, one after another added up in fp32."""
    master = Tower()
    total = [torch.zeros_like(p) for p in master.parameters()]
    for each in inputs:
        half = in_half(master)
        half(each).float().square().sum().backward()
        total = [t + p.grad.float() for t, p in zip(total, half.parameters(), strict=True)]
    return total


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_passes_compute_in_half_and_gradients_add_up_in_fp32(again, keeps):
    tower = Tower(again)
    WorkingCopy(tower, HALF).keeps = keeps
    inputs = [torch.randn(3, 4) for _ in range(3)]
    for each in inputs:
        tower(each).float().square().sum().backward()
        assert all(isinstance(p, nn.Parameter) for p in tower.parameters())
    assert set(tower.seen) == {HALF}
    assert len(tower.seen) == (6 if again else 3)
    for parameter, expected in zip(tower.parameters(), expected_gradients(inputs), strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("as_block", [False, True])
def test_gradients_that_are_added_together_are_those_of_parameters_alone(as_block):
    tower = Tower()
    WorkingCopy(tower, HALF, [tower] if as_block else [])
    inputs = [torch.randn(3, 4) for _ in range(3)]
    for each in inputs:
        tower(each).float().square().sum().backward()
    for parameter, expected in zip(tower.parameters(), expected_gradients(inputs), strict=True):
        assert torch.equal(parameter.grad, expected)


def test_a_gradient_that_is_asked_for_is_given_and_added_to_nothing():
    tower, x = Tower(), torch.randn(3, 4)
    WorkingCopy(tower, HALF, [tower])
    tower(x).float().square().sum().backward()
    before = [p.grad.clone() for p in tower.parameters()]
    asked = torch.autograd.grad(tower(x).float().square().sum(), [*tower.parameters()])
    for parameter, kept, given in zip(tower.parameters(), before, asked, strict=True):
        assert torch.equal(parameter.grad, kept)
        assert given.dtype == torch.float32
        assert torch.equal(given, kept)


def test_a_parameters_own_hooks_see_every_gradient():
    tower, seen = Tower(), []
    WorkingCopy(tower, HALF, [tower])
    tower.first.bias.register_hook(lambda grad: seen.append(grad.dtype))
    tower.second.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    for _ in range(2):
        tower(torch.randn(3, 4)).sum().backward()
    assert seen == [torch.float32] * 4


def test_frozen_parameters_get_no_gradient_and_their_copies_ask_for_none():
    tower = Tower()
    tower.first.requires_grad_(False)
    copy = WorkingCopy(tower, HALF, [tower])
    copy.keeps = True
    tower(torch.randn(3, 4)).sum().backward()
    asks = {parameter: each.requires_grad for parameter, each in copy._copies.items()}
    assert asks == {parameter: parameter.requires_grad for parameter in tower.parameters()}
    assert tower.first.bias.grad is None
    assert tower.second.bias.grad is not None


def test_a_copy_that_is_kept_follows_a_change_of_the_weights():
    tower, x = Tower(), torch.randn(3, 4)
    WorkingCopy(tower, HALF).keeps = True
    tower(x).sum().backward()
    with torch.no_grad():
        tower.first.weight.mul_(2.0)
        assert torch.equal(tower(x), in_half(tower)(x))


def test_micro_batches_of_a_step_share_a_copy_and_the_next_step_has_its_own():
    """An optimizer that is fused changes weights without a word, so it must not be kept then."""
    tower, x = Tower(), torch.randn(3, 4)
    copy = WorkingCopy(tower, HALF)
    module = nn.Module()
    module.root, module.trainer = tower, SimpleNamespace(strategy=SimpleNamespace(model=None))
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        for last in (False, True):
            with gradient_sync(module, enabled=last):
                out = tower(x)
                assert torch.equal(out, in_half(tower)(x))
            out.sum().backward()
            assert bool(copy._copies) == (not last)
        optimizer.step()


def in_half(tower: Tower) -> Tower:
    half = Tower().to(HALF)
    half.second.weight = half.first.weight
    half.load_state_dict(tower.state_dict())
    return half


def test_a_pass_without_gradients_between_forward_and_backward_takes_none_away():
    tower, x = Tower(again=True), torch.randn(3, 4)
    WorkingCopy(tower, HALF)
    out = tower(x)
    with torch.no_grad():
        tower(x)
    out.float().square().sum().backward()
    for parameter, expected in zip(tower.parameters(), expected_gradients([x]), strict=True):
        assert torch.equal(parameter.grad, expected)


def test_a_copy_lives_no_longer_than_its_pass_unless_it_is_kept():
    tower, x = Tower(), torch.randn(3, 4)
    copy = WorkingCopy(tower, HALF)
    for kept in (True, False):
        copy.keeps = kept
        tower(x).sum().backward()
        assert bool(copy._copies) == kept
    with torch.no_grad():
        tower(x)
    assert not copy._copies


def test_after_a_pass_that_fails_the_parameters_are_the_master_weights():
    tower = Tower()
    WorkingCopy(tower, HALF)
    with pytest.raises(RuntimeError):
        tower(torch.randn(3, 5))
    assert all(p.dtype == torch.float32 for p in tower.parameters())


class Refused(torch.autograd.Function):
    """Passes forward and not backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("refused")


class RefusingTower(Tower):
    """A tower with such a part inside."""

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(Refused.apply(self.first(x)))


def test_what_is_saved_and_loaded_after_a_backward_that_failed_is_the_master_weights():
    tower = RefusingTower()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    masters = [*tower.parameters()]
    WorkingCopy(tower, HALF, [tower])
    for reads in (tower.state_dict, lambda: tower.load_state_dict(before)):
        with pytest.raises(RuntimeError, match="refused"):
            tower(torch.randn(3, 4)).sum().backward()
        reads()
        assert [*map(id, tower.parameters())] == [*map(id, masters)]
        assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_gradient_can_be_differentiated_again():
    tower, x = Tower(), torch.randn(3, 4)
    WorkingCopy(tower, HALF, [tower])
    loss = tower(x).float().square().sum()
    grads = torch.autograd.grad(loss, [*tower.parameters()], create_graph=True)
    sum(grad.square().sum() for grad in grads).backward()
    master = Tower()
    loss = master(x).square().sum()
    grads = torch.autograd.grad(loss, [*master.parameters()], create_graph=True)
    sum(grad.square().sum() for grad in grads).backward()
    for parameter, exact in zip(tower.parameters(), master.parameters(), strict=True):
        assert torch.allclose(parameter.grad, exact.grad, rtol=0.1, atol=0.1)


def test_gradients_are_those_of_shards(process_group):
    mesh, ids, gradients = init_device_mesh("cpu", (1,)), global_batch(0), []
    for sharded in (False, True):
        policy = Policy(make_lm())
        parallelize(policy, mesh, param_dtype="bfloat16") if sharded else WorkingCopy(policy, HALF)
        assert is_sharded(policy)
        policy(ids).float().square().sum().backward()
        grads = [p.grad for p in policy.parameters()]
        gradients.append([g.full_tensor() if sharded else g for g in grads])
    for ours, shards in zip(*gradients, strict=True):
        assert torch.equal(ours, shards)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [({}, 1), ({"param_dtype": "float32"}, 1), ({"reshard_after_forward": True}, 0)],
)
def test_one_rank_of_the_strategy_shards_nothing_unless_it_is_asked_to(
    process_group, settings, copies
):
    strategy = FSDP2Strategy(**settings)
    strategy.parallel_devices = [torch.device("cpu")]
    strategy._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=MESH)
    policy = Policy(make_lm())
    strategy.shard(policy, cpu_offload=False)
    assert is_sharded(policy)
    assert len(working_copies(policy)) == copies
    assert any(isinstance(p, DTensor) for p in policy.parameters()) == (copies == 0)
    wrong = FSDP2Strategy(blocks=["Block"], **settings)
    wrong.parallel_devices, wrong._device_mesh = strategy.parallel_devices, strategy.device_mesh
    with pytest.raises(ConfigError, match=r"`blocks` names \['Block'\]"):
        wrong.shard(Policy(make_lm()), cpu_offload=False)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["olmo2", "qwen3"])
def test_passes_are_those_of_a_model_in_half_precision(process_group, kind, sharded):
    """OLMo 2 keeps its factors of RoPE in fp32 then, as servers do."""
    ids, cu_seqlens = pack(make_sequences((12, 20, 7), shared=3))
    policy, half = PackedPolicy(make_model_of(kind)), PackedPolicy(make_model_of(kind))
    for parameter in half.parameters():
        parameter.data = parameter.data.to(HALF)
    mesh = init_device_mesh("cpu", (1,))
    parallelize(policy, mesh, param_dtype="bfloat16") if sharded else WorkingCopy(policy, HALF)
    with torch.no_grad():
        assert torch.equal(policy(ids, cu_seqlens)[0], half(ids, cu_seqlens)[0])
