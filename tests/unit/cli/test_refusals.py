"""A constructor's refusal is told at the setting that it is about."""

from __future__ import annotations

from typing import get_type_hints

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lightning_grpo.cli.fit import with_paths
from lightning_grpo.cli.mistakes import locate
from lightning_grpo.cli.sources import collect
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError

WRITTEN = collect(
    [],
    [
        *("--data.servers.class_path", "lightning_grpo.RunningServers"),
        *("--data.servers.urls", "[127.0.0.1:30000, 127.0.0.1:30001]"),
        *("--data.group_size", "1"),
        *("--trainer.max_steps", "3"),
        *("--data.workflow.init_args.sampling.max_new_tokens", "512"),
        *("--data.evaluation.sampling.top_p", "0.5"),
    ],
)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        (
            "`group_size` must be >= 2 (an advantage needs a baseline), got 1. Way out.",
            "group_size",
        ),
        ("`servers.python` names no interpreter. Make one.", "data.servers"),
        (
            "`evaluation.sampling.max_new_tokens` must leave room for a prompt, got 512. Lower it.",
            "data.evaluation.sampling",
        ),
        (
            "`workflow.sampling.max_new_tokens` must leave room for a prompt, got 512. Lower it.",
            "data.workflow.init_args.sampling.max_new_tokens",
        ),
        ("http://127.0.0.1:30001 has another tokenizer. Start it.", "data.servers.urls.1"),
    ],
)
def test_it_is_the_one_named_or_its_owner_or_the_one_whose_value_is_repeated(message, key):
    problem = locate(ConfigError(message), WRITTEN)
    assert problem.setting.endswith(key)
    assert problem.where == "command line"
    assert str(problem).splitlines()[0] == f"{problem.setting} (command line)"


def test_without_a_setting_the_message_stands_alone():
    problem = locate(ConfigError("The moon is full. Wait."), WRITTEN)
    assert str(problem) == "The moon is full\n  Wait."


def test_a_record_is_told_at_the_setting_that_has_its_value():
    written = collect([], ["--data.evaluation.top_k", "5", "--data.workflow.sampling.top_k", "7"])
    for value, key in ((5, "data.evaluation.top_k"), (7, "data.workflow.sampling.top_k")):
        problem = locate(ConfigError("top_k", "must be -1", value, "Leave it out."), written)
        assert str(problem) == (
            f"{key} (command line)\n  `top_k` must be -1, got {value}\n  Leave it out."
        )


def test_a_record_of_what_nobody_wrote_is_told_at_its_owner():
    problem = locate(ConfigError("servers.python", "names no interpreter"), WRITTEN)
    assert problem.setting == "data.servers"


def test_a_record_is_not_misled_by_the_values_of_other_settings():
    """Words of a rule are no names: it speaks of 3 steps, and `max_steps` is 3."""
    refusal = ConfigError("group_size", "must be >= 2 (max_steps are 3)", 1)
    assert locate(refusal, WRITTEN).setting == "data.group_size"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prompts", "rows.csv"),
        ("prompts", "openai/gsm8k"),
        ("prompts", "shipped:quickstart/train.jsonl"),
        ("prompts", [{"question": "3 x 4?", "answer": "#### 12"}]),
        ("prompts", {"question": ["3 x 4?"], "answer": ["12"]}),
        ("prompts", {"short": "rows.csv", "long": [{"prompt": "hi", "answer": "007"}]}),
        ("val_prompts", "rows.csv"),
        ("servers", "http://127.0.0.1:30000"),
        ("servers", "host-1:30000"),
        ("servers", ["http://127.0.0.1:30000", "http://127.0.0.1:30001"]),
    ],
)
def test_a_config_takes_what_python_takes_in_the_place_of_prompts_and_servers(setting, value):
    parser = ArgumentParser(exit_on_error=False)
    annotation = get_type_hints(RolloutDataModule.__init__)[setting]
    parser.add_argument("--value", type=annotation)
    read = parser.parse_object({"value": value})
    assert read.value == value
    assert yaml.safe_load(parser.dump(read))["value"] == value


def test_a_misspelt_class_is_no_address():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=get_type_hints(RolloutDataModule.__init__)["servers"])
    with pytest.raises(ArgumentError):
        parser.parse_object({"value": "lightning_grpo.SGLangServrs"})


def test_a_dataset_named_on_the_command_line_keeps_the_configs_column(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("data: {prompts: {path: a.jsonl, column: question}}")
    below = [("mine.yaml", config)]
    assert with_paths(below, ["--data.prompts", "b.csv"]) == ["--data.prompts.path", "b.csv"]
    assert with_paths(below, ["--data.prompts=b.csv"]) == ["--data.prompts.path=b.csv"]
    assert with_paths(below, ["--data.prompts", "mine.Prompts"])[0] == "--data.prompts"
    assert with_paths([], ["--data.prompts", "b.csv"])[0] == "--data.prompts"


def test_a_dataset_named_on_the_command_line_may_have_its_settings_beside_it():
    options = ["--data.test_prompts", "b.csv", "--data.test_prompts.column", "question"]
    assert with_paths([], options) == ["--data.test_prompts.path", *options[1:]]
    other = ["--data.test_prompts", "mine.Prompts", "--data.test_prompts.column", "question"]
    assert with_paths([], other) == other
