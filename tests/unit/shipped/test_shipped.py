"""`shipped:` names and the shipped configs, as they resolve in a checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from lightning_grpo.errors import ConfigError
from lightning_grpo.shipped import resolve_config, resolve_path, shipped_configs, shipped_names


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(resolve_path(name)).read_text().splitlines()]


def test_the_quickstart_model_is_a_folder_that_transformers_can_load():
    folder = Path(resolve_path("shipped:quickstart"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    with safe_open(folder / "model.safetensors", "np") as weights:
        embedding = weights.get_tensor("model.embed_tokens.weight")
    assert embedding.shape == (config["vocab_size"], config["hidden_size"])
    assert embedding.dtype == "float32"
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "./model", "/tmp/x", "", "shipped"])
def test_other_strings_come_back_unchanged(name):
    assert resolve_path(name) == name


@pytest.mark.parametrize("name", ["shipped:quickstrat", "shipped:", "shipped:quickstart/../x"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(ConfigError, match=r"shipped:quickstart, .*shipped:quickstart/test\.jsonl"):
        resolve_path(name)


def test_every_listed_name_resolves_to_something_that_exists():
    assert {"shipped:quickstart", "shipped:quickstart/train.jsonl"} <= set(shipped_names())
    for name in shipped_names():
        assert Path(resolve_path(name)).exists()


def test_the_test_split_is_a_thousand_distinct_problems_that_training_never_sees():
    train, test = (read_rows(f"shipped:quickstart/{name}.jsonl") for name in ("train", "test"))
    asked = {row["question"] for row in test}
    assert len(test) == len(asked) == 1000
    assert not asked & {row["question"] for row in train}
    for row in train + test:
        assert set(row) == {"question", "answer"}
        assert row["answer"].splitlines()[-1].removeprefix("#### ").isdigit()


def test_a_config_file_that_exists_wins_over_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = resolve_config("quickstart.yaml")
    assert Path(shipped).is_absolute()
    Path("quickstart.yaml").write_text("trainer: {}\n")
    assert resolve_config("quickstart.yaml") == "quickstart.yaml"


def test_an_unknown_config_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"gsm8k\.yaml, quickstart\.yaml"):
        resolve_config(str(tmp_path / "gsm9k.yaml"))


def test_every_shipped_config_is_yaml_and_names_shipped_files_that_exist():
    assert {"gsm8k.yaml", "quickstart.yaml"} <= set(shipped_configs())
    for name in shipped_configs():
        config = yaml.safe_load(Path(resolve_config(name)).read_text())
        assert {"model", "data", "trainer"} <= set(config)
        for key in ("prompts", "val_prompts"):
            assert resolve_path(config["data"][key]["path"])
