"""Gathering from sharded parameters on two real ranks, and SGLang's own way into a group."""

from __future__ import annotations

import threading

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from lightning_grpo._compat import listen_at
from lightning_grpo.naming import CheckpointNames
from lightning_grpo.policy.load import without_bars
from lightning_grpo.policy.packed import PackedPolicy
from lightning_grpo.weights.gather import gather_weights, make_buckets
from lightning_grpo.weights.process_group import WeightGroup, address_towards
from tests.fakes.causal_models import make_model_of
from tests.fakes.ranks import start_ranks


class Policy(nn.Module):
    """An embedding tied to nothing, two blocks, and a head: the root keeps parameters itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 11)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden).relu()
        return self.head(hidden) * self.scale


def gather_on_a_rank(when: str) -> dict[str, list] | None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = Policy()
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for block in policy.blocks:
        fully_shard(block, **options)
    # The root stays whole, and in bf16, after a forward pass.
    fully_shard(policy, reshard_after_forward=False, **options)
    if when == "after a forward pass":
        policy(torch.arange(5))
    kept = gather_weights(policy, torch.float32, keep=dist.get_rank() == 0)
    cast = gather_weights(policy, torch.bfloat16, keep=dist.get_rank() == 0)
    result = {name: tensor.tolist() for name, tensor in kept.items()}
    assert {tensor.dtype for tensor in cast.values()} <= {torch.bfloat16}
    dist.barrier()
    dist.destroy_process_group()
    return result


@pytest.mark.parametrize(
    "when", [pytest.param("at once", marks=pytest.mark.slow), "after a forward pass"]
)
def test_sharded_weights_come_back_whole_and_exact(when):
    with start_ranks(gather_on_a_rank, 2, when) as ranks:
        results = ranks.join(timeout_s=50)
    assert [r.returncode for r in results] == [0, 0], results[0].output + results[1].output
    expected = {name: tensor.tolist() for name, tensor in Policy().state_dict().items()}
    assert results[0].value == expected
    assert results[1].value == {}


def name_on_a_rank() -> dict[str, list] | None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = PackedPolicy(make_model_of("deepseek_v3"))
    for block in policy.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    weights = gather_weights(policy, torch.float32, keep=dist.get_rank() == 0)
    sent = CheckpointNames(policy.model).of(weights) if weights else {}
    dist.barrier()
    dist.destroy_process_group()
    return {name: tensor.tolist() for name, tensor in sent.items()}


def test_sharded_experts_come_back_one_by_one_as_a_checkpoint_has_them(tmp_path):
    with start_ranks(name_on_a_rank, 2) as ranks:
        results = ranks.join(timeout_s=50)
    assert [r.returncode for r in results] == [0, 0], results[0].output + results[1].output
    with without_bars():
        make_model_of("deepseek_v3").save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert results[0].value == {name: tensor.tolist() for name, tensor in expected.items()}
    assert results[1].value == {}


def receive_as_sglang_does(invitation: dict, num_bytes: int) -> bytes:
    from datetime import timedelta

    from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world
    from torch.distributed.rendezvous import rendezvous

    address = f"tcp://{invitation['master_address']}:{invitation['master_port']}"
    timeout = timedelta(seconds=30)
    store, rank, world_size = next(
        rendezvous(address, invitation["rank_offset"], invitation["world_size"], timeout=timeout)
    )
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        invitation["backend"],
        PrefixStore(invitation["group_name"], store),
        group_name=invitation["group_name"],
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    flat = torch.empty(num_bytes, dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=group)
    return flat.numpy().tobytes()


def test_a_receiver_that_joins_as_sglang_does_gets_the_bytes():
    (bucket,) = make_buckets({"w": torch.arange(1000.0)}, 1 << 20)
    group = WeightGroup("g-1", "gloo", 2, "127.0.0.1", 30.0)
    with start_ranks(receive_as_sglang_does, 1, group.invitation(), 4000) as ranks:
        group.join([])
        group.broadcast(bucket.flat)
        (result,) = ranks.join(timeout_s=40)
    assert result.value == bucket.flat.numpy().tobytes()


def test_joining_ends_when_the_invitation_was_refused():
    group = WeightGroup("g-2", "gloo", 2, "127.0.0.1", 30.0)
    stopped: list[bool] = []
    joining = threading.Thread(target=group.join, args=(stopped,))
    joining.start()
    stopped.append(True)
    joining.join(10)
    assert not joining.is_alive()


def test_the_address_is_the_one_that_the_server_would_see():
    assert address_towards("http://127.0.0.1:30000") == "127.0.0.1"
    assert address_towards("http://localhost:30000") in ("127.0.0.1", "::1")


def test_the_store_of_a_group_listens_at_the_address_that_servers_are_told_alone():
    group = WeightGroup("narrow", "gloo", 2, "127.0.0.1", 30.0)
    port = group.invitation()["master_port"]
    listening = {
        c.laddr.ip for c in psutil.Process().net_connections("inet") if c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


def test_a_store_listens_everywhere_where_its_address_is_another_machine_s():
    assert listen_at("192.0.2.1") == (0, None)
