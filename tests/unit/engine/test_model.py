"""Which models the engine runs, and that those it refuses are refused by their config alone."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging as transformers_logging

from lightning_grpo.contract import check_engine
from lightning_grpo.engine.model import ModelRunner, SlotCache, check_servable, load_model
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


SERVED = [
    ("mistral", {"sliding_window": 128}),  # no sequence is longer: full attention
    ("mistral", {"sliding_window": None}),
    ("phi3", {"sliding_window": 500}),
    ("phimoe", {"sliding_window": 128}),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": False}),
    ("gpt2", {}),
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


REFUSED = [
    ("mistral", {"sliding_window": 127}, "sliding window of 127 tokens, shorter than the context"),
    ("phimoe", {"sliding_window": 16}, "sliding window of 16 tokens"),
    ("gemma3_text", {"sliding_window": 16}, "sliding window of 16 tokens"),
    ("deepseek_v3", {}, "differ in shape (multi-head latent attention)"),
    ("deepseek_v2", {}, "differ in shape (multi-head latent attention)"),
    ("opt", {}, "its layers ask for a cache of another kind"),
    ("gpt_oss", {}, "has a `s_aux`"),
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


def test_a_folder_that_lacks_weights_is_not_served_with_random_ones(tmp_path):
    model = make_model_of("qwen3")
    values = {n: v for n, v in model.state_dict().items() if "layers.1." not in n}
    model.save_pretrained(tmp_path, state_dict=values)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.input_layernorm"):
        load_model(str(tmp_path))
