"""What is refused by one line, and what a tokenizer's line says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from lightning_grpo.certify.checks import CheckLine
from lightning_grpo.certify.run import (
    Certificate,
    architecture,
    architectures,
    certify,
    certify_each,
    certify_kind,
    counts,
    table,
    template,
)
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


# -- architectures in processes of their own, and the table of what was found ----------------------


GOOD = Certificate(
    "qwen3",
    (
        CheckLine("packed", "ok", "", 9.5e-7, 1e-4),
        CheckLine("gradient", "ok", "", 6.3e-8, 1e-6),
        CheckLine("engine", "skipped", "not served here: x"),
    ),
)
REFUSED = Certificate(
    "gemma2", (CheckLine("architecture", "refused", "a cap | of\nlogits. Way out: another model."),)
)
WRONG = Certificate(
    "b", (CheckLine("packed", "WRONG", "rows differ", 0.5, 1e-4), CheckLine("names", "refused", ""))
)


@pytest.mark.slow
def test_each_is_certified_in_a_process_of_its_own():
    good, refused = certify_each(["qwen3", "mamba"])
    assert (good.model, good.verdict) == ("qwen3", "certified")
    assert (refused.model, refused.verdict) == ("mamba", "refused")
    assert "must have recurrent layers that can begin anew" in refused.why


def test_one_that_takes_too_long_is_ended_and_not_tried():
    (late,) = certify_each(["qwen3"], seconds=0.0)
    assert late.verdict == "untried"
    assert late.why == "`time`: not done after 0 s"


def test_a_config_that_transformers_can_t_make_is_not_tried():
    (line,) = certify_kind("no_such_kind")
    assert (line.check, line.verdict) == ("config", "untried")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gemma4_assistant", "a language model alone"),
        ("qwen4_exp_text", r"Qwen4ExpForCausalLM has \['indexed_attention'\]"),
        ("reformer", "let transformers choose its attention, Reformer"),
    ],
)
def test_what_a_config_leaves_open_and_checkpoints_set_is_set(kind, said):
    (line,) = certify_kind(kind)
    assert (line.check, line.verdict) == ("architecture", "refused")
    assert re.search(said, line.found)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("cohere_compass_text", marks=pytest.mark.slow),
        "dbrx",
        pytest.param("lfm2_moe", marks=pytest.mark.slow),
    ],
)
def test_what_is_set_as_checkpoints_do_can_be_certified(kind):
    assert {line.verdict for line in certify_kind(kind)} <= {"ok", "skipped"}


def test_one_of_several_parts_is_refused_whether_or_not_transformers_can_make_it():
    (line,) = certify_kind("musicgen")
    assert (line.check, line.verdict) == ("architecture", "refused")
    assert "consists of parts" in line.found


def test_the_worst_line_is_the_verdict():
    assert [each.verdict for each in (GOOD, REFUSED, WRONG)] == ["certified", "refused", "WRONG"]
    assert counts([GOOD, REFUSED, WRONG]) == "1 certified, 1 refused, 1 WRONG, 0 untried"


def test_the_table_has_the_certified_first_and_why_others_are_not():
    rows = table([REFUSED, WRONG, GOOD]).splitlines()[2:]
    assert rows == [
        "| `qwen3` | certified | 9.5e-07 | 6.3e-08 | no |  |",
        "| `b` | WRONG | 5.0e-01 |  |  | `packed`: rows differ |",
        "| `gemma2` | refused |  |  |  | `architecture`: a cap \\| of logits |",
    ]


def test_all_causal_architectures_are_there():
    assert {"qwen2", "qwen3", "llama", "mixtral", "gemma2"} < set(architectures())
