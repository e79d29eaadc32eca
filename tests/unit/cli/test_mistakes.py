"""Every way we know of getting a configuration wrong, message by message."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lightning_grpo.cli.fit import split_configs, with_paths
from lightning_grpo.cli.mistakes import import_object, locate
from lightning_grpo.cli.sources import ConfigProblem, collect
from lightning_grpo.cli.trainer_cli import run_cli
from lightning_grpo.datamodule import RolloutDataModule as RealDataModule
from lightning_grpo.errors import ConfigError
from tests.fakes.cli_stubs import GRPOModule, RolloutDataModule

GOOD = """\
seed_everything: false
trainer:
  accelerator: cpu
  max_steps: 30
model:
  model: shipped:quickstart
  loss:
    class_path: tests.fakes.cli_stubs.GRPOLoss
    init_args: {clip_high: 0.28}
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {lr: 1.0e-4}
data:
  prompts: &prompts {path: train.jsonl, column: question}
  val_prompts:
    <<: *prompts
    path: test.jsonl
  workflow:
    class_path: tests.fakes.cli_stubs.RLVRWorkflow
    init_args:
      reward: tests.fakes.cli_stubs.reward
      sampling: {max_new_tokens: 56}
  servers: tests.fakes.cli_stubs.EmbeddedServers
  batch_size: 16
  group_size: 8
"""

MY_MODULES = """\
from tests.fakes.cli_stubs import GRPOModule

class MaxRL(GRPOModule):
    pass

class NotOne:
    pass
"""


def fit(file: Path, arguments: list[str]) -> None:
    configs, options = split_configs(["--config", str(file), *arguments])
    configs = [(Path(name).name, path) for name, path in configs]
    run_cli("fit", configs, options, collect(configs, options), GRPOModule, RolloutDataModule)


def refusal(folder: Path, arguments: str, config: str = GOOD) -> list[str]:
    """The lines with which `fit --config good.yaml ARGUMENTS` is refused."""
    file = folder / "good.yaml"
    file.write_text(config)
    with pytest.raises(ConfigProblem) as caught:
        fit(file, shlex.split(arguments))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    return [line.strip() for line in lines]


COMMAND_LINE = {
    "--model.lr_scheduler ReduceLROnPlateau --model.lr_scheduler.monitor eval/avg_at_1": [
        "model.lr_scheduler (command line)",
        "must be an import path (`package.module.name`), since several have the name"
        " 'ReduceLROnPlateau'",
        "did you mean `lightning.pytorch.cli.ReduceLROnPlateau`?",
    ],
    "--model.lr_scheduler StepLRR --model.lr_scheduler.step_size 3": [
        "model.lr_scheduler (command line)",
        "must be an import path (`package.module.name`), got 'StepLRR'",
        "did you mean `StepLR`?",
    ],
    "--ckpt_path gone.ckpt": [
        "ckpt_path (command line)",
        "`ckpt_path` must name a checkpoint, and there is no 'gone.ckpt'.",
    ],
    "--data.max_stal 7": [
        "data.max_stal (command line)",
        "is not a setting of RolloutDataModule, got 7",
        "did you mean `data.max_staleness`?",
    ],
    "--data.max_stalenes=7": [
        "data.max_stalenes (command line)",
        "is not a setting of RolloutDataModule, got 7",
        "did you mean `data.max_staleness`?",
    ],
    "--trainer.max_steps abc": [
        "trainer.max_steps (command line)",
        "must be an int, got 'abc'",
    ],
    "--trainer.gradient_clip_vall 1": [
        "trainer.gradient_clip_vall (command line)",
        "is not a setting of Trainer, got 1",
        "did you mean `trainer.gradient_clip_val`?",
    ],
    "--trainer.strategy ddp_fork --trainer.devices 2": [
        "trainer.strategy (command line)",
        "`trainer.strategy` must start each rank as a program of its own (those that are forked"
        " hear of no signal to this one), got 'ddp_fork'",
        "Use `ddp` or `fsdp2`.",
    ],
    "--trainer.strategy fsdp3": [
        "trainer.strategy (command line)",
        "`fsdp3` is not a registered strategy",
        "did you mean `fsdp`?",
    ],
    "--trainer.strategy tests.fakes.cli_stubs.GRPOLoss": [
        "trainer.strategy (command line)",
        "must be a Strategy, and `tests.fakes.cli_stubs.GRPOLoss` is not one",
    ],
    "--trainer.strategy.clas_path x": [
        "trainer.strategy (command line)",
        "needs `class_path`, the import path of a Strategy",
    ],
    "--modle.model x": [
        "modle (command line)",
        "is not a section of a config (seed_everything, trainer, model, data)",
        "did you mean `model`?",
    ],
    "--model.los.clip_high 3": [
        "model.los (command line)",
        "is not a setting of GRPOModule, got {'clip_high': 3}",
        "did you mean `model.loss`?",
    ],
    "--model.loss.clip_higher 3": [
        "model.loss.clip_higher (command line)",
        "is not a setting of GRPOLoss, got 3",
        "did you mean `model.loss.clip_high`?",
    ],
    "--model.loss.init_args.clip_high wide": [
        "model.loss.init_args.clip_high (command line)",
        "must be a number, got 'wide'",
    ],
    "--model.entropy_coefficient much": [
        "model.entropy_coefficient (command line)",
        "must be a number, got 'much'",
    ],
    "--model.optimizer.lrr 3": [
        "model.optimizer.lrr (command line)",
        "is not a setting of AdamW, got 3",
        "did you mean `model.optimizer.lr`?",
    ],
    "--model.optimizer torch.optim.AdamX": [
        "model.optimizer (command line)",
        "`torch.optim.AdamX` can't be imported: `torch.optim` has no `AdamX`",
        "did you mean `torch.optim.Adam`?",
    ],
    "--model.optimizer collections.OrderedDict": [
        "model.optimizer (command line)",
        "must make a Optimizer, and `collections.OrderedDict` does not",
    ],
    "--data.workflow.reward nowhere.reward": [
        "data.workflow.reward (command line)",
        "`nowhere.reward` can't be imported: there is no module `nowhere`",
    ],
    "--data.workflow.reward tests.fakes.cli_stubs.rewarding": [
        "data.workflow.reward (command line)",
        "`tests.fakes.cli_stubs.rewarding` can't be imported: `tests.fakes.cli_stubs` has no "
        "`rewarding`",
        "did you mean `tests.fakes.cli_stubs.reward`?",
    ],
    "--data.workflow.sampling.max_new_token 3": [
        "data.workflow.sampling.max_new_token (command line)",
        "is not a setting of Sampling, got 3",
        "did you mean `data.workflow.sampling.max_new_tokens`?",
    ],
    "--data.servers.num_server 3": [
        "data.servers.num_server (command line)",
        "is not a setting of EmbeddedServers, got 3",
        "did you mean `data.servers.num_servers`?",
    ],
    "--data.servers EmbededServers": [
        "data.servers (command line)",
        "must be an import path (`package.module.name`), got 'EmbededServers'",
        "did you mean `EmbeddedServers`?",
    ],
    "--data.servers tests.fakes.cli_stubs.Prompts": [
        "data.servers (command line)",
        "must be a Servers, and `tests.fakes.cli_stubs.Prompts` is not one",
        "known: EmbeddedServers, SGLangServers",
    ],
    "--data.limits.reward_processes several": [
        "data.limits.reward_processes (command line)",
        "must be an int, got 'several'",
    ],
    "--data.val_prompts.limit few": [
        "data.val_prompts.limit (command line)",
        "must be an int or null, got 'few'",
    ],
    "--data.keep_group 3": [
        "data.keep_group (command line)",
        "must be the import path of a function or null, got 3",
    ],
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitr x": [
        "trainer.callbacks[0].monitr (command line)",
        "is not a setting of ModelCheckpoint, got 'x'",
        "did you mean `trainer.callbacks[0].monitor`?",
    ],
    "stray": [
        "stray (command line)",
        "is not an option: options begin with `--`",
    ],
    "mine.yaml": [
        "mine.yaml (command line)",
        "is not an option: options begin with `--`",
        "did you mean `--config mine.yaml`?",
    ],
    "--max_steps 30": [
        "max_steps (command line)",
        "is not a section of a config (seed_everything, trainer, model, data)",
        "did you mean `trainer.max_steps`?",
    ],
    "--group_size 4": [
        "group_size (command line)",
        "is not a section of a config (seed_everything, trainer, model, data)",
        "did you mean `data.group_size`?",
    ],
    "--config nowhere.yaml": [
        "--config (command line)",
    ],
    "--config": [
        "--config (command line)",
        "needs the name of a file",
    ],
    # what constructors refuse
    "--data.group_size 1": [
        "data.group_size (command line)",
        "`group_size` must be >= 2 (an advantage needs a baseline), got 1",
        "Raise it, or subclass GRPOModule with another baseline.",
    ],
    "--model.loss.clip_low -1": [
        "model.loss.clip_low (command line)",
        "`clip_low` must be > 0, got -1.0",
        "The paper uses 0.2.",
    ],
    "--trainer.strategy lightning_grpo.FSDP2Strategy --trainer.strategy.shard_size 0": [
        "trainer.strategy.shard_size (command line)",
        "`shard_size` must be >= 1, got 0",
    ],
    "--trainer.accelerator gpuu": [
        "trainer.accelerator (command line)",
        "You selected an invalid accelerator name: `accelerator='gpuu'`",
    ],
}


@pytest.mark.parametrize("arguments", COMMAND_LINE)
def test_a_mistake_on_the_command_line_is_named(arguments, tmp_path):
    expected = COMMAND_LINE[arguments]
    assert refusal(tmp_path, arguments)[: len(expected)] == expected


YAML = {
    ("max_steps: 30", "max_steps: soon"): [
        "trainer.max_steps (good.yaml, line 4)",
        "must be an int, got 'soon'",
    ],
    ("max_steps: 30", "max_step: 30"): [
        "trainer.max_step (good.yaml, line 4)",
        "is not a setting of Trainer, got 30",
        "did you mean `trainer.max_steps`?",
    ],
    ("clip_high: 0.28", "clip_hihg: 0.28"): [
        "model.loss.init_args.clip_hihg (good.yaml, line 9)",
        "is not a setting of GRPOLoss, got 0.28",
        "did you mean `model.loss.init_args.clip_high`?",
    ],
    ("class_path: tests.fakes.cli_stubs.GRPOLoss", "class_path: tests.fakes.cli_stubs.GRPOLos"): [
        "model.loss (good.yaml, line 8)",
        "`tests.fakes.cli_stubs.GRPOLos` can't be imported: `tests.fakes.cli_stubs` has no "
        "`GRPOLos`",
        "did you mean `tests.fakes.cli_stubs.GRPOLoss`?",
    ],
    ("group_size: 8", "group_size: 1"): [
        "data.group_size (good.yaml, line 25)",
        "`group_size` must be >= 2 (an advantage needs a baseline), got 1",
    ],
    ("group_size: 8", "group_siez: 8"): [
        "data.group_siez (good.yaml, line 25)",
        "is not a setting of RolloutDataModule, got 8",
        "did you mean `data.group_size`?",
    ],
    ("batch_size: 16", "batch_size: 16\n  batch_size: 32"): [
        "data.batch_size (good.yaml, line 25)",
        "is given twice (first in line 24): keep one",
    ],
    ("  batch_size: 16", " batch_size: 16"): [
        "(good.yaml, line 24)",
    ],
    ("data:", "dat:"): [
        "dat (good.yaml, line 13)",
        "is not a section of a config (seed_everything, trainer, model, data)",
        "did you mean `data`?",
    ],
    ("  servers: tests.fakes.cli_stubs.EmbeddedServers\n", ""): [
        "data.servers (good.yaml, line 13)",
        "is missing: RolloutDataModule has no default for it",
    ],
    ("      reward: tests.fakes.cli_stubs.reward\n", ""): [
        "data.workflow.init_args.reward (good.yaml, line 20)",
        "is missing: RLVRWorkflow has no default for it",
    ],
    ("group_size: 8", "group_size:"): [
        "data.group_size (good.yaml, line 25)",
        "must be an int, got None",
    ],
    ("max_new_tokens: 56", "max_new_tokens: null"): [
        "data.workflow.init_args.sampling.max_new_tokens (good.yaml, line 22)",
        "must be an int, got None",
    ],
    ("trainer:\n  accelerator: cpu\n  max_steps: 30", "trainer: 3"): [
        "trainer (good.yaml, line 2)",
        "must hold settings (`trainer: {name: value}`), got 3",
    ],
    ("path: train.jsonl", "limit: [1]"): [
        "data.prompts.limit (good.yaml, line 14)",
        "must be an int or null, got [1]",
    ],
    ("model: shipped:quickstart", "model: [a, b]"): [
        "model.model (good.yaml, line 6)",
        "must be text, got ['a', 'b']",
    ],
}


@pytest.mark.parametrize("change", YAML, ids=lambda change: change[1].strip() or "removed")
def test_a_mistake_in_a_file_is_named_with_its_line(change, tmp_path):
    assert change[0] in GOOD
    expected = YAML[change]
    assert refusal(tmp_path, "", GOOD.replace(*change, 1))[: len(expected)] == expected


def test_a_class_of_the_current_folder_that_is_no_module_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine_not_one.py").write_text(MY_MODULES)
    monkeypatch.syspath_prepend(tmp_path)
    lines = refusal(tmp_path, "--model mine_not_one.NotOne")
    assert lines[:2] == [
        "model (command line)",
        "must be a GRPOModule, and `mine_not_one.NotOne` is not one",
    ]


def test_a_misspelt_class_of_the_current_folder_is_suggested(tmp_path, monkeypatch):
    (tmp_path / "mine_misspelt.py").write_text(MY_MODULES)
    monkeypatch.syspath_prepend(tmp_path)
    lines = refusal(tmp_path, "--model mine_misspelt.MaxRLL")
    assert lines[2] == "did you mean `mine_misspelt.MaxRL`?"


def test_a_fault_inside_the_users_own_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine_broken.py").write_text("def reward(completion)\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = refusal(tmp_path, "--data.workflow.reward mine_broken.reward")
    assert lines[0] == "data.workflow.reward (command line)"
    assert "mine_broken raised SyntaxError: expected ':'" in lines[1]


def test_a_missing_section_says_where_to_get_a_config(tmp_path):
    lines = refusal(tmp_path, "", "trainer: {max_steps: 3}\n")
    assert lines == [
        "model is missing",
        "give `--config FILE` (quickstart.yaml and gsm8k.yaml are shipped)",
    ] or lines[0].startswith("model")


def test_a_file_name_in_the_place_of_settings_is_named_where_it_stands(tmp_path):
    lines = refusal(tmp_path, "--data.prompts rows.jsonl")
    assert lines[:2] == [
        "data.prompts (command line)",
        "`rows.jsonl` can't be imported: there is no module `rows`",
    ]


def test_a_public_name_that_is_not_loaded_yet_is_suggested():
    class Another:
        pass

    with pytest.raises(ConfigProblem) as caught:
        import_object("SGLangServers", Another)
    assert caught.value.way_out == "did you mean `lightning_grpo.SGLangServers`?"


# ---- a constructor's refusal is told at the setting that it is about ----------------------------

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


def test_a_value_is_told_rather_than_the_section_of_its_name(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("model:\n  model: there\n  loss: lightning_grpo.GRPOLoss\n")
    written = collect([("a.yaml", config)], ["--model.model", "/here"])
    problem = locate(ConfigError("`model` must give finite logprobs. Mend it."), written)
    assert (problem.setting, problem.where) == ("model.model", "command line")


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
    annotation = get_type_hints(RealDataModule.__init__)[setting]
    parser.add_argument("--value", type=annotation)
    read = parser.parse_object({"value": value})
    assert read.value == value
    assert yaml.safe_load(parser.dump(read))["value"] == value


def test_a_misspelt_class_is_no_address():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=get_type_hints(RealDataModule.__init__)["servers"])
    with pytest.raises(ArgumentError):
        parser.parse_object({"value": "lightning_grpo.SGLangServrs"})


def test_a_dataset_named_on_the_command_line_keeps_the_configs_column(tmp_path):
    config = tmp_path / "mine.yaml"
    below = [("mine.yaml", config)]
    config.write_text("data: {class_path: a.B, init_args: {prompts: {path: a.jsonl}}}")
    assert with_paths(below, ["--data.prompts", "b.csv"]) == ["--data.prompts.path", "b.csv"]
    config.write_text("data: {prompts: {path: a.jsonl, column: question}}")
    assert with_paths(below, ["--data.prompts", "b.csv"]) == ["--data.prompts.path", "b.csv"]
    assert with_paths(below, ["--data.prompts=b.csv"]) == ["--data.prompts.path=b.csv"]
    assert with_paths(below, ["--data.prompts", "mine.Prompts"])[0] == "--data.prompts"
    assert with_paths([], ["--data.prompts", "b.csv"])[0] == "--data.prompts"


def test_a_dataset_named_on_the_command_line_may_have_its_settings_beside_it():
    options = ["--data.test_prompts", "b.csv", "--data.test_prompts.column", "question"]
    assert with_paths([], options) == ["--data.test_prompts.path", *options[1:]]
    other = ["--data.test_prompts", "mine.Prompts", "--data.test_prompts.column", "question"]
    assert with_paths([], other) == other
