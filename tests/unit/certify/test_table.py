"""Architectures in processes of their own, and the table of what was found."""

from __future__ import annotations

import re

import pytest

from lightning_grpo.certify.parts import CheckLine
from lightning_grpo.certify.table import (
    Certificate,
    architectures,
    certify_each,
    certify_kind,
    counts,
    table,
)

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


@pytest.mark.parametrize("kind", ["cohere_compass_text", "dbrx", "lfm2_moe"])
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
