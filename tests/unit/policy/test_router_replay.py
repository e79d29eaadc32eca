"""Passes of a policy through experts that were chosen elsewhere."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_grpo.algorithm.layers import Replay
from lightning_grpo.errors import ConfigError
from lightning_grpo.policy.check import check_architecture
from lightning_grpo.policy.load import checkpoint_activations
from lightning_grpo.policy.packed import PackedPolicy, compile_blocks
from tests.fakes.causal_models import make_causal_model, make_sequences, pack, plain_logprobs
from tests.fakes.mixtures import FORMULAS, MIXTURES, make_mixture, own_routes, routers

LENGTHS = (7, 12, 30, 3, 2, 9)


def run(model, ids, bounds, experts=None, **settings):
    """Logprobs, gradients and what was counted of one pass."""
    policy = PackedPolicy(copy.deepcopy(model), router_replay=True, **settings)
    replay = None if experts is None else Replay(experts)
    logprobs, entropy = policy(ids, bounds, 0.7, with_entropy=True, replay=replay)
    counted = None if replay is None else (*replay.counts.tolist(), replay.num_choices)
    (logprobs.sin() + entropy.cos()).sum().backward()
    grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return logprobs.detach(), grads, counted


def furthest(left, right):
    return max((left[name] - right[name]).abs().max().item() for name in right)


def random_routes(num_tokens, seed=5):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, 3, 8, generator=generator)
    return scores.topk(2, dim=-1).indices


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", MIXTURES)
def test_its_own_routes_replayed_change_nothing_at_all(kind, share):
    model = make_mixture(kind)
    ids, bounds = pack(make_sequences(LENGTHS, shared=5))
    experts = own_routes(model, ids, bounds)
    logprobs, grads, _ = run(model, ids, bounds, share_prefixes=share)
    replayed, same_grads, counted = run(model, ids, bounds, experts, share_prefixes=share)
    assert torch.equal(replayed, logprobs)
    assert furthest(same_grads, grads) == 0.0
    num_dense = 3 - len(routers(model))
    if not num_dense:  # -1 in a layer without experts is none of any layer's business
        assert counted == (counted[2], 0, counted[2])


@pytest.mark.parametrize(
    "shift",
    [lambda e: e.roll(1, 0), lambda e: e.roll(1, 1), lambda e: (e + 1) % 8],
    ids=["by a token", "by a layer", "by an expert"],
)
def test_routes_that_are_shifted_are_seen(shift):
    model = make_mixture("qwen3_moe")
    ids, bounds = pack(make_sequences(LENGTHS))
    experts = own_routes(model, ids, bounds)
    logprobs, _, _ = run(model, ids, bounds, experts)
    shifted, _, (replayed, rerouted, _) = run(model, ids, bounds, shift(experts))
    assert (shifted - logprobs).abs().mean() > 0.01
    assert rerouted > replayed / 2


def through_a_plain_loop(model, experts, formula):
    """The same model whose mixtures are written out: token by token, expert by expert."""
    model = copy.deepcopy(model)
    start = 0

    def forward(self, hidden, layer):
        nonlocal start
        rows = hidden[0]
        chosen = experts[start : start + len(rows), layer]
        weights = formula(self.gate, rows, chosen)
        out = []
        for row, numbers, shares in zip(rows, chosen, weights, strict=True):
            total = torch.zeros_like(row)
            for number, share in zip(numbers.tolist(), shares, strict=True):
                gate, up = (self.experts.gate_up_proj[number] @ row).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                total = total + share * (self.experts.down_proj[number] @ inner)
            out.append(total)
        start += len(rows) if layer == len(model.model.layers) - 1 else 0
        return torch.stack(out)[None]

    for index, layer in enumerate(model.model.layers):
        layer.mlp.forward = MethodType(lambda self, h, i=index: forward(self, h, i), layer.mlp)
    return model


def test_logprobs_and_gradients_are_those_of_a_plain_loop_over_given_experts():
    model = make_mixture("qwen3_moe")
    sequences = make_sequences(LENGTHS)
    ids, bounds = pack(sequences)
    experts = random_routes(len(ids))
    plain = through_a_plain_loop(model, experts, FORMULAS["qwen3_moe"])
    expected, entropy = plain_logprobs(plain, sequences, 0.7)
    (expected.sin() + entropy.cos()).sum().backward()
    logprobs, grads, _ = run(model, ids, bounds, experts)
    assert (logprobs - expected).abs().max() < 5e-6
    expected_grads = {
        f"model.{name}": p.grad for name, p in plain.named_parameters() if p.grad is not None
    }
    assert expected_grads.keys() == grads.keys()
    assert any("gate.weight" in name for name in grads)
    for name, expected_grad in expected_grads.items():
        assert (grads[name] - expected_grad).norm() < 2e-5 * expected_grad.norm().clamp_min(1e-3)


def test_prompts_are_shared_as_far_as_their_experts_are_the_same():
    model = make_mixture("qwen3_moe")
    sequences = make_sequences((20, 20, 20, 20), shared=12)
    ids, bounds = pack(sequences)
    experts = random_routes(len(ids))
    experts[20:32] = experts[:12]  # the first two agree throughout their prompt
    experts[60:67] = experts[40:47]  # and the others in its first half
    apart = run(model, ids, bounds, experts, share_prefixes=False)
    shared = run(model, ids, bounds, experts, share_prefixes=True)
    assert (shared[0] - apart[0]).abs().max() < 5e-6
    assert furthest(shared[1], apart[1]) < 2e-5
    assert (apart[2][2], shared[2][2]) == (3 * 80, 3 * (80 - 12 - 7))


def test_a_token_whose_experts_nobody_knows_takes_its_own():
    model = make_mixture("qwen3_moe")
    ids, bounds = pack(make_sequences(LENGTHS))
    plain = run(model, ids, bounds)
    for dtype in (torch.uint8, torch.int16):
        unknown = torch.full((len(ids), 3, 2), -1).to(dtype)
        logprobs, grads, counted = run(model, ids, bounds, unknown)
        assert torch.equal(logprobs, plain[0])
        assert furthest(grads, plain[1]) == 0.0
        assert counted == (0, 0, 3 * len(ids))
    # A sequence of whose tokens some are known is as if its own choice had been told for the rest.
    experts = random_routes(len(ids))
    partly = experts.clone()
    partly[4:] = -1
    logprobs, _, counted = run(model, ids, bounds, partly)
    assert counted[0] == 4 * 3
    # An expert is given more or fewer rows, and a product may sum in another order for those.
    assert (logprobs[7:] - plain[0][7:]).abs().max() < 1e-6
    assert not torch.allclose(logprobs[:7], plain[0][:7])


def test_cutting_into_micro_batches_changes_nothing():
    model = make_mixture("qwen3_moe")
    ids, bounds = pack(make_sequences(LENGTHS))
    experts = random_routes(len(ids))
    whole, grads, counted = run(model, ids, bounds, experts)
    parts = []
    for start, end in ((0, 3), (3, 6)):
        low, high = int(bounds[start]), int(bounds[end])
        cut = (ids[low:high], bounds[start : end + 1] - low, experts[low:high])
        parts.append(run(model, *cut))
    assert (torch.cat([part[0] for part in parts]) - whole).abs().max() < 5e-6
    summed = {name: parts[0][1][name] + parts[1][1][name] for name in grads}
    assert furthest(summed, grads) < 2e-5
    assert tuple(map(sum, zip(*(part[2] for part in parts), strict=True))) == counted


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_blocks_that_are_computed_again_take_the_same_experts(kind):
    model = make_mixture(kind)
    ids, bounds = pack(make_sequences(LENGTHS))
    experts = random_routes(len(ids))
    kept = run(model, ids, bounds, experts)
    checkpoint_activations(model)
    again = run(model, ids, bounds, experts)
    assert torch.equal(again[0], kept[0])
    assert furthest(again[1], kept[1]) == 0.0
    assert again[2] == kept[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_blocks_take_the_same_experts_and_are_compiled_once():
    model = make_mixture("qwen3_moe")
    policy = PackedPolicy(copy.deepcopy(model), router_replay=True, share_prefixes=False)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(policy.model, backend=counter)
    policy.compiled = True  # nothing is counted of routers that are told
    frames = []
    for lengths in (LENGTHS, (9, 9), (30, 4, 5), (11, 20)):
        ids, bounds = pack(make_sequences(lengths))
        experts = random_routes(len(ids)).to(torch.uint8)
        replay = Replay(experts)
        logprobs, _ = policy(ids, bounds, 0.7, replay=replay)
        logprobs.sum().backward()
        assert (logprobs - run(model, ids, bounds, experts)[0]).abs().max() < 5e-6
        assert replay.counts[0] == replay.num_choices
        frames.append(counter.frame_count)
    assert frames[-1] == frames[-2]
    torch._dynamo.reset()


def test_a_policy_that_was_not_built_for_it_chooses_for_itself():
    model = make_mixture("qwen3_moe")
    ids, bounds = pack(make_sequences(LENGTHS))
    policy = PackedPolicy(model)
    replay = Replay(random_routes(len(ids)))
    with torch.no_grad():
        assert torch.equal(policy(ids, bounds, replay=replay)[0], policy(ids, bounds)[0])
    assert replay.num_choices == 0


def test_routes_of_another_shape_are_refused():
    policy = PackedPolicy(make_mixture("qwen3_moe"), router_replay=True)
    with pytest.raises(ValueError, match=r"must be \[tokens, 3, 2\], got \[4, 2, 2\]"):
        policy(torch.arange(4), replay=Replay(torch.zeros(4, 2, 2)))


def test_models_without_routers_are_refused_before_anything_is_loaded(tmp_path):
    make_causal_model("qwen3").save_pretrained(tmp_path / "dense")
    make_mixture("qwen3_moe").save_pretrained(tmp_path / "mixture")
    check_architecture(str(tmp_path / "mixture"), router_replay=True)
    check_architecture(str(tmp_path / "dense"))
    with pytest.raises(ConfigError, match=r"`router_replay` needs a mixture.*Qwen3ForCausalLM"):
        check_architecture(str(tmp_path / "dense"), router_replay=True)


def test_a_model_that_keeps_the_routes_from_its_attention_is_refused():
    model = make_mixture("qwen3_moe")
    policy = PackedPolicy(model, router_replay=True)
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention._forward_pre_hooks.clear()
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    ids, bounds = pack(make_sequences(LENGTHS))
    with pytest.raises(ConfigError, match="passes on to its attention"):
        policy(ids, bounds, replay=Replay(random_routes(len(ids))))
