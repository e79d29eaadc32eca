"""Which models the engine runs, and that those it refuses are refused by their config alone."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging as transformers_logging

from lightning_grpo.contract import check_engine
from lightning_grpo.engine.cache import PrefillCapture, SlotCache
from lightning_grpo.engine.model import (
    ModelRunner,
    check_servable,
    load_model,
    windowed,
)
from lightning_grpo.engine.updates import ModelWeights
from lightning_grpo.errors import ConfigError
from lightning_grpo.servers.base import RunningServers
from lightning_grpo.servers.process import EmbeddedServers
from tests.fakes.causal_models import make_model_of, make_sequences, plain_logprobs


@pytest.fixture(autouse=True)
def no_bars():
    """As in the engine's process: a bar has a thread."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
SERVED = [
    ("mistral", {"sliding_window": 128}),  # no sequence is longer: full attention
    ("mistral", {"sliding_window": 5}),
    ("gemma3_text", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    ("phimoe", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None}),
    ("phi3", {"sliding_window": 500}),
    ("phimoe", {"sliding_window": 128}),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": False}),
    ("gpt2", {}),
    ("gpt_oss", {"sliding_window": 5, "num_attention_heads": 4}),
    ("gemma2", {"sliding_window": 5, "num_attention_heads": 4, **CAPS}),
    ("cohere", {"logit_scale": 0.3}),
    ("granite", {"logits_scaling": 6.0}),
    ("mixtral", {"sliding_window": None}),
]


@pytest.mark.parametrize(("kind", "settings"), SERVED)
def test_what_it_samples_from_is_what_the_model_computes(kind, settings, tmp_path):
    make_model_of(kind, **settings).save_pretrained(tmp_path)
    check_servable(str(tmp_path))
    (ids,) = make_sequences([12])
    expected, _ = plain_logprobs(make_model_of(kind, **settings), [ids])
    runner = ModelRunner(load_model(str(tmp_path)))
    _, scores = runner.score(ids.tolist(), 0)
    assert torch.allclose(scores, expected[1:], atol=1e-5)
    state = runner.prefill([ids[:10].tolist()])[0]
    slots = SlotCache(1, 16)
    slots.reserve(1, 12, state.kv)
    slots.place(0, 1, state.kv)
    logits = runner.decode(slots, ids[10:11], torch.tensor([10]))
    assert logits.log_softmax(-1)[0, ids[11]] == pytest.approx(expected[11].item(), abs=1e-5)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    ("mistral", {"sliding_window": None, "hidden_act": "gelu"}),
    ("qwen2", {"use_sliding_window": False}),  # with biases
    ("qwen3", {"attention_bias": True, "head_dim": 8}),
]


def randomized(model):
    """Biases, too, which begin at 0, and norms."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def decoded(runner, rows, num_read):
    """Logits of the tokens behind those that are read, all rows together."""
    states = runner.prefill([row[:num_read].tolist() for row in rows])
    slots = SlotCache(len(rows), len(rows[0]) + 1)
    slots.reserve(len(rows), len(rows[0]) + 1, states[0].kv)
    for slot, state in enumerate(states):
        slots.place(slot, 1, state.kv)
    tokens, lengths = torch.stack(rows), torch.full((len(rows),), num_read)
    steps = range(len(rows[0]) - num_read)
    return torch.stack([runner.decode(slots, tokens[:, num_read + t], lengths + t) for t in steps])


@pytest.mark.parametrize(("kind", "settings"), PLAIN)
def test_a_plain_model_is_decoded_without_its_modules_and_gives_the_same(kind, settings, tmp_path):
    torch.manual_seed(1)
    randomized(make_model_of(kind, **settings)).save_pretrained(tmp_path)
    rows = make_sequences([12, 12, 12])
    runner = ModelRunner(load_model(str(tmp_path)))
    assert runner.plain is not None
    found = decoded(runner, rows, 5)
    runner.plain = None
    assert torch.allclose(found, decoded(runner, rows, 5), atol=2e-5)


def test_weights_that_are_written_to_a_plain_model_count_from_the_next_step_on(tmp_path):
    make_model_of("qwen3").save_pretrained(tmp_path)
    runner, rows = ModelRunner(load_model(str(tmp_path))), make_sequences([9, 9])
    before = decoded(runner, rows, 5)
    weights = ModelWeights(runner.model)
    weights.writer(dict(randomized(make_model_of("qwen3")).state_dict()), complete=True)()
    after = decoded(runner, rows, 5)
    runner.plain = None
    assert torch.allclose(after, decoded(runner, rows, 5), atol=2e-5)
    assert not torch.allclose(after, before, atol=0.1)


NOT_PLAIN = [
    ("mistral", {"sliding_window": 5}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ("granite", {}),
    ("olmo2", {}),
]


@pytest.mark.parametrize(("kind", "settings"), NOT_PLAIN)
def test_other_blocks_are_left_to_transformers(kind, settings, tmp_path):
    make_model_of(kind, **settings).save_pretrained(tmp_path)
    assert ModelRunner(load_model(str(tmp_path))).plain is None


@pytest.mark.parametrize("part", ["mlp", "self_attn.o_proj", "input_layernorm"])
def test_a_model_that_computes_otherwise_than_its_kind_is_found_out(part, tmp_path):
    make_model_of("qwen3").save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    other = model.model.layers[1].get_submodule(part)
    other.register_forward_hook(lambda module, args, out: 1.05 * out)
    assert ModelRunner(model).plain is None


def test_one_that_decodes_row_by_row_decodes_as_it_reads(tmp_path):
    make_model_of("qwen3").save_pretrained(tmp_path)
    assert ModelRunner(load_model(str(tmp_path)), row_by_row=True).plain is None


GEMMA4 = {
    **{"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    **{"hidden_size_per_layer_input": 0, "num_global_key_value_heads": 2, "global_head_dim": 32},
}
REFUSED = [
    ("gemma4_text", GEMMA4, "the keys of its layers differ in shape: [2, 2, 16] in the first"),
    ("deepseek_v3", {}, "differ in shape (multi-head latent attention)"),
    ("deepseek_v2", {}, "differ in shape (multi-head latent attention)"),
    ("opt", {}, "its layers ask for a cache of another kind"),
]


@pytest.mark.parametrize(("kind", "settings", "reason"), REFUSED)
def test_what_it_can_t_run_is_refused_before_a_process_is_started(kind, settings, reason, tmp_path):
    make_model_of(kind, **settings).config.save_pretrained(tmp_path)  # no weights
    with pytest.raises(ConfigError) as refused:
        check_engine(EmbeddedServers(), str(tmp_path))
    assert f"({kind}): " in str(refused.value)
    assert reason in str(refused.value)
    assert "SGLangServers" in str(refused.value)
    check_engine(RunningServers(["http://localhost:1"]), str(tmp_path))
    check_engine(None, str(tmp_path))


@pytest.mark.parametrize("window", [1, 3, 4, 5])
def test_a_window_hides_from_each_query_what_it_has_left_behind(window):
    positions = torch.tensor([[0, 1, 2, 2], [3, 4, 4, 4]])  # of two slots' queries, some padded
    distance = positions[:, :, None] - torch.arange(5)
    mask = torch.zeros(distance.shape).masked_fill(distance < 0, float("-inf"))[:, None]
    expected = (distance >= 0) & (distance < window)
    assert torch.equal(windowed(mask, window)[:, 0] == 0, expected)
    assert torch.equal(windowed(mask, None), mask)


def test_a_folder_that_lacks_weights_is_not_served_with_random_ones(tmp_path):
    model = make_model_of("qwen3")
    values = {n: v for n, v in model.state_dict().items() if "layers.1." not in n}
    model.save_pretrained(tmp_path, state_dict=values)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.input_layernorm"):
        load_model(str(tmp_path))


# ---- slots keep what was put in them through growth and moves -----------------------------------

LAYERS, HEADS, DIM = 2, 3, 4


def allocated(slots: SlotCache) -> int:
    """Tokens that the memory in hand has room for."""
    return slots.store.shape[2] * slots.store.shape[4]


def prompt(length: int, seed: int) -> torch.Tensor:
    """Keys and values of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 2, HEADS, length, DIM, generator=generator)


def window(slots: SlotCache, lengths: list[int]) -> list[torch.Tensor]:
    """What attention would see of each slot, `[layers, 2, kv_heads, length, head_dim]`."""
    step = slots.step(torch.tensor(lengths)[:, None], max(lengths) + 1)
    new = torch.full((len(lengths), HEADS, 1, DIM), 7.0)
    layers = [torch.stack(step.update(new, 2 * new, layer)) for layer in range(LAYERS)]
    seen = torch.stack(layers)
    return [seen[:, :, row, :, : length + 1] for row, length in enumerate(lengths)]


def test_slots_hold_prompts_of_different_lengths_and_the_new_token_behind_them() -> None:
    slots = SlotCache(max_slots=4, max_length=200)
    short, long = prompt(2, 0), prompt(5, 1)
    slots.reserve(3, 6, short)
    slots.place(0, 2, short)
    slots.place(2, 1, long)
    first, second, third = window(slots, [2, 2, 5])
    for seen, expected in ((first, short), (second, short), (third, long)):
        assert torch.equal(seen[..., :-1, :], expected)
        assert bool((seen[:, 0, :, -1] == 7).all())
        assert bool((seen[:, 1, :, -1] == 14).all())


def test_growth_in_slots_and_length_keeps_what_is_there() -> None:
    slots = SlotCache(max_slots=8, max_length=300)
    kept = prompt(3, 0)
    slots.reserve(1, 4, kept)
    slots.place(0, 1, kept)
    slots.grow(150)
    slots.reserve(5, 200, kept)
    other = prompt(199, 1)
    slots.place(4, 1, other)
    seen = window(slots, [3, 0, 0, 0, 199])
    assert torch.equal(seen[0][..., :-1, :], kept)
    assert torch.equal(seen[4][..., :-1, :], other)
    assert allocated(slots) <= 8 * 300


def test_growth_stops_at_the_limits() -> None:
    slots = SlotCache(max_slots=3, max_length=70)
    slots.reserve(2, 65, prompt(1, 0))
    assert allocated(slots) == 2 * 70
    slots.reserve(3, 70, prompt(1, 0))
    assert allocated(slots) == 3 * 70
    slots.clear()
    assert allocated(slots) == 0


def test_moved_slots_bring_their_tokens() -> None:
    slots = SlotCache(max_slots=3, max_length=64)
    states = [prompt(4, seed) for seed in range(3)]
    slots.reserve(3, 5, states[0])
    for slot, state in enumerate(states):
        slots.place(slot, 1, state)
    slots.move([2], [0], 4)
    first, second = window(slots, [4, 4])
    assert torch.equal(first[..., :-1, :], states[2])
    assert torch.equal(second[..., :-1, :], states[1])


def test_a_wiped_slot_holds_no_nan() -> None:
    slots = SlotCache(max_slots=2, max_length=64)
    slots.reserve(2, 5, prompt(4, 0))
    slots.place(0, 2, torch.full_like(prompt(4, 0), float("nan")))
    slots.wipe(1)
    first, second = window(slots, [4, 4])
    assert bool(first.isnan().any())
    assert not bool(second.isnan().any())


def test_a_capture_gives_each_prompt_without_its_padding() -> None:
    capture = PrefillCapture()
    layers = [(torch.randn(2, HEADS, 5, DIM), torch.randn(2, HEADS, 5, DIM)) for _ in range(LAYERS)]
    for index, (keys, values) in enumerate(layers):
        assert capture.update(keys, values, index)[0] is keys
    state = capture.prompt(1, 3)
    assert state.shape == (LAYERS, 2, HEADS, 3, DIM)
    for index, (keys, values) in enumerate(layers):
        assert torch.equal(state[index, 0], keys[1, :, :3])
        assert torch.equal(state[index, 1], values[1, :, :3])
