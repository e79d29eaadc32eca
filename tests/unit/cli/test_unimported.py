"""Mistakes that are told before anything heavy is imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW

import lightning_grpo
from lightning_grpo.cli.fit import split_configs
from lightning_grpo.cli.mistakes import parameters
from lightning_grpo.cli.sources import ConfigProblem, collect
from lightning_grpo.cli.unimported import arguments_of, refuse_at_once, refuse_missing_prompts

REPOSITORY = Path(__file__).parents[3]
GOOD = (REPOSITORY / "configs/quickstart.yaml").read_text()


def refuse(folder: Path, old: str = "", new: str = "", *options: str) -> None:
    """Read the quickstart's config with one change, and options."""
    assert old in GOOD
    (folder / "c.yaml").write_text(GOOD.replace(old, new, 1))
    configs, rest = split_configs(["--config", str(folder / "c.yaml"), *options])
    settings = collect(configs, rest)
    refuse_at_once(settings)
    refuse_missing_prompts(settings, configs)


# -- what a source says is what the class says ----------------------------------------------------

PUBLIC = [
    each
    for name in lightning_grpo.__all__
    if inspect.isclass(each := getattr(lightning_grpo, name, None))
]


@pytest.mark.parametrize("cls", [*PUBLIC, Trainer, ModelCheckpoint, AdamW, SGD])
def test_what_is_read_of_a_class_is_what_it_accepts(cls):
    read = arguments_of(f"{cls.__module__}.{cls.__qualname__}")
    known = parameters(cls)
    if read is not None and not known.open:
        assert {n: a.required for n, a in read.items()} == {
            n: p.required for n, p in known.known.items()
        }


@pytest.mark.parametrize("name", ["GRPOModule", "RolloutDataModule", "GRPOLoss", "RLVRWorkflow"])
def test_the_classes_that_configs_name_most_can_be_read(name):
    assert arguments_of(f"lightning_grpo.{name}")


@pytest.mark.parametrize(
    "source",
    [
        "class C:\n    def __init__(self, **settings): ...",
        "from somewhere_else import C",
        "C = make_class()",
        "if this:\n    class C: ...\nelse:\n    class C: ...",
        "class C(metaclass=Made): ...",
        "class C(Unknown): ...",
        "@changed\nclass C: ...",
        "this is no Python",
        "class C:\n    if this:\n        def __init__(self, a=1): ...",
        "class C:\n    __init__ = made()",
        "class C:\n    @swapped\n    def __init__(self, a=1): ...",
        "class C:\n    def __init__(self, a=1): ...\nC.__init__ = made",
        "@changed\nclass C:\n    def __init__(self, a=1): ...",
        "@changed\ndef C(a=1): ...",
        "class C:\n    def __init__(self, a=1): ...\nC: type = changed(C)",
        "class C:\n    def __init__(self, a=1): ...\nC, D = changed(C), 1",
        "class C: ...\nfor _ in 1, 2:\n    class C: ...",
        "class C: ...\nwith this:\n    from somewhere_else import C",
        "class C: ...\nfrom somewhere_else import *",
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    if this:\n        a: int = 1",
    ],
)
def test_what_is_not_sure_is_left_to_the_parser(source, tmp_path, monkeypatch):
    (tmp_path / "unsure_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert arguments_of("unsure_module.C") is None


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=str)
def test_what_ships_is_not_refused(config):
    refuse_at_once(collect([(config.name, config)], []))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_steps:", "max_step:", "trainer.max_step .*\n.*not a setting of Trainer"),
        ("group_size:", "group_siz:", r"data.group_siz .*\n.*\n.*mean `data.group_size`\?"),
        ("lr: ", "lrr: ", "optimizer.init_args.lrr .*\n.*not a setting of AdamW"),
        ("clip_high", "clip_higher", "loss.init_args.clip_higher .*\n.*setting of GRPOLoss"),
        ("GRPOLoss", "GRPOLos", "model.loss .*\n.*has no `GRPOLos`\n.*mean `lightning_grpo.GRPOL"),
        ("greedy: false", "greed: false", "evaluation.greed .*\n.*not a setting of Evaluation"),
        ("lightning_grpo.rewards.gsm8k", "my_rewrd.f", "reward .*\n.*no module `my_rewrd`"),
        ("torch.optim.AdamW", "torhc.AdamW", "model.optimizer .*\n.*no module `torhc`"),
        ("shipped:quickstart/train.jsonl", "gone.csv", r"prompts.path \(.*\n.*got 'gone.csv'"),
        ("  workflow:", "  workflow_:", "not a setting of RolloutDataModule"),
        ("model:\n  model:", "model:\n  compile: false\n  modell:", "modell"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path, old, new, said):
    with pytest.raises(ConfigProblem, match=said):
        refuse(tmp_path, old, new)


def test_a_section_that_is_missing_is_told(tmp_path):
    with pytest.raises(ConfigProblem, match=r"model\n.*is missing\n.*--config FILE"):
        refuse_at_once(collect([], []))


def test_a_class_of_the_users_is_read_and_not_run(tmp_path, monkeypatch):
    (tmp_path / "read_only_module.py").write_text(
        "from lightning_grpo import GRPOModule\n"
        "raise RuntimeError('imported')\n"
        "class MaxRL(GRPOModule):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    refuse(tmp_path, "model:\n", "model:\n  class_path: read_only_module.MaxRL\n  init_args:\n  ")
    with pytest.raises(ConfigProblem, match=r"model.los .*\n.*is not a setting of MaxRL"):
        refuse(tmp_path, "", "", "--model", "read_only_module.MaxRL", "--model.los", "1")


def test_arguments_of_a_class_that_another_source_replaced_are_no_mistakes(tmp_path):
    optimizer = "torch.optim.SGD"
    refuse(tmp_path, "", "", "--model.optimizer", optimizer, "--model.optimizer.momentum", "0.5")
    with pytest.raises(ConfigProblem, match=r"betas .*\n.*not a setting of SGD"):
        refuse(tmp_path, "", "", "--model.optimizer", optimizer, "--model.optimizer.betas", "[0,0]")


def test_arguments_of_the_class_that_a_section_has_by_default_are_no_mistakes(tmp_path):
    refuse(tmp_path, "", "", "--model.init_args.compile", "false")


def test_a_file_with_the_settings_of_a_component_is_no_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss.yaml").write_text("class_path: lightning_grpo.GRPOLoss\n")
    refuse(tmp_path, "", "", "--model.loss", "loss.yaml")
    with pytest.raises(ConfigProblem, match="no module `gone`"):
        refuse(tmp_path, "", "", "--model.loss", "gone.yaml")


def test_what_stands_in_data_is_left_as_it_stands(tmp_path, monkeypatch):
    (tmp_path / "data_module.py").write_text(
        "class C:\n    def __init__(self, table: dict | None = None, more=None): ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in "table", "more":
        arguments = f"{{{name}: {{class_path: torch.optim.SGD, init_args: {{nothing: 1}}}}}}"
        callback = f"[{{class_path: data_module.C, init_args: {arguments}}}]"
        refuse(tmp_path, "", "", f"--trainer.callbacks={callback}")


def test_settings_of_a_class_of_data_are_looked_at_wherever_they_stand(tmp_path, monkeypatch):
    (tmp_path / "own_data_module.py").write_text(
        "from lightning_grpo import RolloutDataModule\n"
        "class Mine(RolloutDataModule):\n"
        "    def make_prompt(self, row, tokenizer): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    refuse(tmp_path, "", "", "--data", "own_data_module.Mine", "--data.batch_size", "4")
    with pytest.raises(ConfigProblem, match=r"(?s)data.batch_sise.*is not a setting of Mine"):
        refuse(tmp_path, "", "", "--data", "own_data_module.Mine", "--data.batch_sise", "4")
    nowhere = "{class_path: own_data_module.Mine, init_args: {prompts: gone.csv}}"
    (tmp_path / "own.yaml").write_text(f"data: {nowhere}\n")
    with pytest.raises(ConfigProblem, match=r"gone.csv"):
        refuse_missing_prompts(collect([("own.yaml", tmp_path / "own.yaml")], []), [])


def test_a_name_is_found_by_the_name_that_it_has_here(tmp_path, monkeypatch):
    (tmp_path / "renaming_module.py").write_text(
        "from lightning_grpo import GRPOLoss as SGD, GSPOLoss as GRPOLoss\n"
        "class Mine(GRPOLoss): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    gspo = arguments_of("lightning_grpo.GSPOLoss")
    assert arguments_of("renaming_module.GRPOLoss") == arguments_of("renaming_module.Mine") == gspo


def test_a_file_that_lies_beside_the_config_is_named(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "mine.jsonl").touch()
    with pytest.raises(ConfigProblem, match=f"beside the config there is one: `{folder}/mine"):
        refuse(folder, "shipped:quickstart/train.jsonl", "mine.jsonl")


HEAVY = """\
import sys
from lightning_grpo.cli.main import main
assert main(sys.argv[1:]) == 2
loaded = {"torch", "lightning", "transformers"} & sys.modules.keys()
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "words",
    [
        ("fot",),
        ("fit",),
        ("fit", "--config", "gone.yaml"),
        ("fit", "--config", "broken.yaml"),
        ("fit", "--config", "quickstart.yaml", "--data.max_stal", "7"),
        ("validate", "--config", "quickstart.yaml", "--trainer.max_step", "7"),
        ("plan", "--config", "quickstart.yaml", "--data.max_stal", "7"),
    ],
    ids=str,
)
def test_it_is_told_without_an_import_of_torch(tmp_path, words):
    (tmp_path / "broken.yaml").write_text("data: [1\nb: 2")
    command = [sys.executable, "-c", HEAVY, *words]
    own = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=tmp_path, env=own, check=True, timeout=60)
