"""What is refused by one line, and what a tokenizer's line says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from lightning_grpo.certify.run import architecture, certify, template
from lightning_grpo.shipped import resolve_path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "minimax",
            "['linear_attention'] (16 layers, 0 that could), which would",
        ),
        ("mamba", "must have recurrent layers that can begin anew at each sequence"),
        ("gemma3", "consists of parts: text, vision"),
        ("vit", "must be a causal language model"),
    ],
)
def test_what_the_package_refuses_is_refused_by_one_line_with_its_sentence(kind, reason):
    (line,) = certify(CONFIG_MAPPING[kind]())
    assert (line.check, line.verdict) == ("architecture", "refused")
    assert reason in line.found
    assert "Way out" in line.found


def test_quantized_weights_are_refused():
    config = CONFIG_MAPPING["qwen3"]()
    config.quantization_config = {"quant_method": "fp8"}
    assert "are quantized (fp8)" in architecture(config).found


def test_a_model_as_large_as_it_may_be_is_looked_at_by_its_shapes():
    large = CONFIG_MAPPING["llama"](hidden_size=16384, num_attention_heads=128, num_hidden_layers=4)
    assert architecture(large).verdict == "ok"


@pytest.fixture
def folder(tmp_path):
    for file in Path(resolve_path("shipped:quickstart")).iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def test_a_template_is_shown_with_what_ends_an_answer(folder):
    line = template(str(folder), AutoConfig.from_pretrained(folder))
    assert line.verdict == "ok"
    assert "<|im_start|>assistant" in line.found
    assert line.found.endswith("ends with <|im_end|>")


def test_a_template_that_never_lets_the_model_speak_is_wrong(folder):
    silent = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(silent)
    assert template(str(folder), AutoConfig.from_pretrained(folder)).verdict == "WRONG"


def test_a_template_that_takes_no_question_is_wrong_and_says_why(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only for tools') }}")
    line = template(str(folder), AutoConfig.from_pretrained(folder))
    assert line.verdict == "WRONG"
    assert "only for tools" in line.found


def test_without_tokenizer_or_template_there_is_nothing_to_look_at(folder):
    config = AutoConfig.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    assert template(str(folder), config).found == "no chat template: it continues texts"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert template(str(folder), config).verdict == "skipped"
