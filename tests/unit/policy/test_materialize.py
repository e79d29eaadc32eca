import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_grpo.errors import ConfigError
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy.load import load_policy, materialize_from_folder, rebuild_buffers
from lightning_grpo.policy.packed import PackedPolicy
from tests.fakes.causal_models import (
    ARCHITECTURES,
    make_causal_model,
    make_sequences,
    pack,
    plain_logprobs,
)
from tests.fakes.ranks import start_ranks


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_materialized_model_computes_the_same_bits_as_a_loaded_one(architecture, tied, tmp_path):
    make_causal_model(architecture, tie_word_embeddings=tied).save_pretrained(tmp_path)
    packed = pack(make_sequences([9, 12]))
    expected, _ = PackedPolicy(load_policy(str(tmp_path)))(*packed)
    policy = load_policy(str(tmp_path), meta=True)
    materialize_from_folder(policy, str(tmp_path))
    found, _ = PackedPolicy(policy)(*packed)
    assert torch.equal(found, expected)


def test_the_values_of_the_meta_device_come_from_where_model_kwargs_say(tmp_path):
    for place, seed in ((tmp_path, 0), (tmp_path / "older", 1)):
        make_causal_model(seed=seed).save_pretrained(place)
    kwargs = {"subfolder": "older"}  # a hub's `revision` goes the same way
    loaded, sharded = (GRPOModule(str(tmp_path), model_kwargs=kwargs) for _ in range(2))
    loaded.configure_model()
    with torch.device("meta"):
        sharded.configure_model()
    sharded.materialize(sharded.sharding_root(), torch.device("cpu"))
    expected = dict(loaded.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in sharded.named_parameters())


def test_long_context_frequencies_are_made_again_too(tmp_path):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    make_causal_model("llama", rope_parameters=scaled).save_pretrained(tmp_path)
    packed = pack(make_sequences([9, 40]))
    policy = load_policy(str(tmp_path), meta=True)
    materialize_from_folder(policy, str(tmp_path))
    expected, _ = PackedPolicy(load_policy(str(tmp_path)))(*packed)
    assert torch.equal(PackedPolicy(policy)(*packed)[0], expected)


def test_without_rebuilt_buffers_the_model_would_be_silently_wrong(tmp_path):
    make_causal_model().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))
    packed = pack(make_sequences([9, 12]))
    expected, _ = PackedPolicy(policy)(*packed)
    for name, buffer in policy.named_buffers():
        assert "inv_freq" in name
        buffer.zero_()
    assert not torch.allclose(PackedPolicy(policy)(*packed)[0], expected, atol=1e-3)
    rebuild_buffers(policy)
    assert torch.equal(PackedPolicy(policy)(*packed)[0], expected)


def test_a_buffer_that_cannot_be_made_again_is_refused(tmp_path):
    model = make_causal_model()
    model.model.extra = nn.Module()
    model.model.extra.register_buffer("scale", torch.ones(1), persistent=False)
    with pytest.raises(ConfigError, match=r"buffers in `model\.extra`"):
        rebuild_buffers(model)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    make_causal_model(num_hidden_layers=1).save_pretrained(tmp_path / "small")
    make_causal_model().save_pretrained(tmp_path / "whole")
    policy = load_policy(str(tmp_path / "whole"), meta=True)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1"):
        materialize_from_folder(policy, str(tmp_path / "small"))


def sharded(folder):
    """One rank of FSDP2 from the meta device: its logprobs, and whole gradients."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        model = load_policy(folder, meta=True)
        policy = PackedPolicy(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        root = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(policy, mesh=mesh, mp_policy=root)
        materialize_from_folder(model, folder)
        packed = pack(make_sequences([9, 12, 5], seed=distributed.get_rank()))
        logprobs, entropy = policy(*packed, 0.7, with_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
        gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        return logprobs.tolist(), {n: g.tolist() for n, g in gradients.items()}
    finally:
        distributed.destroy_process_group()


def test_two_sharded_ranks_from_the_meta_device_equal_one_whole_model(tmp_path):
    model = make_causal_model()
    model.save_pretrained(tmp_path)
    with start_ranks(sharded, 2, str(tmp_path)) as ranks:
        results = ranks.join(timeout_s=50)
    assert [r.returncode for r in results] == [0, 0], results[0].output + results[1].output
    total = 0.0
    for result in results:
        sequences = make_sequences([9, 12, 5], seed=result.rank)
        expected, entropy = plain_logprobs(model, sequences, 0.7)
        assert torch.allclose(torch.tensor(result.value[0]), expected, atol=1e-5)
        total = total + (expected.sum() + entropy.sum()) / 2
    total.backward()
    for name, parameter in model.named_parameters():
        for result in results:
            found = torch.tensor(result.value[1][name])
            assert torch.allclose(found, parameter.grad, atol=1e-4), name


def fill_from_an_incomplete_folder(folder):
    """One rank of FSDP2: what it is told."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        model = load_policy(folder, meta=True)
        fully_shard(PackedPolicy(model), mesh=mesh)
        with pytest.raises(ConfigError) as refused:
            materialize_from_folder(model, folder)
        return str(refused.value)
    finally:
        distributed.destroy_process_group()


def test_weights_that_are_missing_are_named_on_every_rank(tmp_path):
    model = make_causal_model(tie_word_embeddings=False)
    values = {n: v for n, v in model.state_dict().items() if n != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=values)
    with start_ranks(fill_from_an_incomplete_folder, 2, str(tmp_path)) as ranks:
        results = ranks.join(timeout_s=50)
    assert [r.returncode for r in results] == [0, 0], results[0].output + results[1].output
    for result in results:
        assert "lacks lm_head.weight" in result.value
