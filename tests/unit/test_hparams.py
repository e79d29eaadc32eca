"""Constructor arguments as plain data, and back."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import yaml
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, StepLR

from lightning_grpo import hparams
from lightning_grpo.algorithm.corrections import TokenTIS
from lightning_grpo.algorithm.losses import K3, GRPOLoss, KLPenalty, SequenceMean
from lightning_grpo.errors import CheckpointError, ConfigError
from lightning_grpo.hparams import loggable
from lightning_grpo.rewards import gsm8k
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.servers.base import RunningServers
from lightning_grpo.types import Sampling
from tests.fakes.user_objects import ScaledLoss, make_adam, own_loss

OBJECTS = [
    GRPOLoss(clip_high=0.3, aggregation=SequenceMean()),
    KLPenalty(0.1, K3()),
    TokenTIS(cap=3.0),
    ScaledLoss(0.5),
]


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
def test_objects_become_a_class_path_and_arguments_and_come_back(value, tmp_path):
    plain = hparams.to_plain({"loss": value})
    torch.save(plain, tmp_path / "file")
    loaded = torch.load(tmp_path / "file", weights_only=True)
    assert loaded["loss"]["class_path"].endswith(type(value).__name__)
    assert loaded["not_restored"] == []
    restored = hparams.from_plain(loaded["loss"])
    assert type(restored) is type(value)
    assert vars(restored) == vars(value)


def test_a_config_s_spelling_is_kept_but_for_dataclasses_whose_name_it_may_leave_out():
    spelled = {"kl": {"coefficient": 0.1}, "loss": {"class_path": "my.Loss", "init_args": {}}}
    plain = hparams.to_plain({"kl": KLPenalty(0.1), "loss": Opaque(3)}, spelled)
    assert hparams.from_plain(plain["kl"]) == KLPenalty(0.1)
    assert plain["loss"] == spelled["loss"]
    assert plain["not_restored"] == []


def test_functions_and_containers_become_import_paths_and_containers():
    given = {"optimizer": make_adam, "loss": own_loss, "kwargs": {"a": [1, (2.0, None)]}}
    plain = hparams.to_plain(given)
    assert plain["kwargs"] == {"a": [1, [2.0, None]]}
    assert hparams.from_plain(plain["loss"]) is own_loss
    assert hparams.factory(plain["optimizer"]) is make_adam


def test_a_config_s_factory_is_built_from_its_class_path():
    build = hparams.factory({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}})
    optimizer = build([torch.nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.5
    assert hparams.factory(None) is None


class Opaque:
    def __init__(self, number):
        self._hidden = number


@pytest.mark.parametrize(
    "value", [lambda params: None, functools.partial(make_adam, lr=1.0), Opaque(3)]
)
def test_what_has_no_import_path_or_hides_its_arguments_is_listed_and_not_kept(value):
    plain = hparams.to_plain({"model": "m", "optimizer": value})
    assert plain == {"model": "m", "not_restored": ["optimizer"]}


def test_what_could_not_be_kept_must_be_passed_again():
    saved = {"model": "m", "not_restored": ["optimizer", "loss"]}
    hparams.require_restored(saved, {"optimizer", "loss"}, "GRPOModule")
    with pytest.raises(CheckpointError, match=r"`loss` of this.*GRPOModule\(loss=\.\.\.\)"):
        hparams.require_restored(saved, {"optimizer"}, "GRPOModule")


@pytest.mark.parametrize("path", ["no_such_module.Loss", "torch.optim.NoSuch", "Loss"])
def test_an_import_path_that_is_gone_is_named(path):
    with pytest.raises(CheckpointError, match=f"`{path}` of the checkpoint's hyper-parameters"):
        hparams.from_plain({"class_path": path, "init_args": {}})


@pytest.mark.parametrize("settings", [{"lr": math.inf}, {"lr": 0.1, "momentum": math.inf}])
def test_an_optimizer_s_infinite_number_is_refused_before_it_breaks_the_weights(settings):
    make = functools.partial(torch.optim.SGD, **settings)
    with pytest.raises(ConfigError, match="of `optimizer` must be finite, got inf"):
        hparams.build("optimizer", make, [torch.nn.Parameter(torch.ones(1))])


def test_a_factory_that_refuses_its_settings_is_named():
    with pytest.raises(ConfigError, match="`optimizer` could not be built: ValueError: Invalid"):
        hparams.build(
            "optimizer",
            functools.partial(torch.optim.AdamW, lr=-1.0),
            [torch.nn.Parameter(torch.zeros(1))],
        )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (functools.partial(StepLR, step_size=0), "steps, and fails after step 1: ZeroDivision"),
        (functools.partial(CosineAnnealingLR, T_max=0), "fails after step 1: ZeroDivisionError"),
        (functools.partial(OneCycleLR, max_lr=0.1, total_steps=4), "fails after step 5: ValueErr"),
        (functools.partial(ExponentialLR, gamma=-1.0), "at least 0, got -0.1 after step 1"),
        (functools.partial(ExponentialLR, gamma=math.nan), "finite .*, got nan after step 1"),
        (functools.partial(ExponentialLR, gamma=1e200), "finite .*, got inf after step 2"),
    ],
)
def test_a_schedule_that_fails_at_a_later_step_is_refused_before_the_first(make, said):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match=said):
        hparams.require_schedule(make, optimizer, 6)


def test_a_schedule_is_tried_without_touching_the_optimizer():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    make = functools.partial(OneCycleLR, max_lr=0.2, total_steps=6)
    hparams.require_schedule(make, optimizer, 6)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "step" not in vars(optimizer)


def test_loggers_are_told_what_can_be_read_and_no_data_or_secrets():
    workflow = RLVRWorkflow(gsm8k, Sampling(48))
    rows = [{"question": "2+2=", "answer": "4"}] * 30
    told = loggable(
        {
            "workflow": workflow,
            "prompts": {"": Prompts(rows, column="question")},
            "servers": RunningServers(["http://a:1"], api_key="sk-1"),
            "keep": lambda group: True,
        }
    )
    arguments = told["workflow"]["init_args"]
    assert arguments["reward"] == ["lightning_grpo.rewards.answers.gsm8k"]
    assert arguments["sampling"]["init_args"]["max_new_tokens"] == 48
    prompts = told["prompts"]["init_args"]
    assert (prompts["path"], prompts["column"]) == ("list (30 items)", "question")
    assert told["servers"]["init_args"]["urls"] == ["http://a:1"]
    assert "sk-1" not in yaml.safe_dump(told)


def test_the_names_that_loggers_are_told_are_paths_that_mlflow_takes():
    told = loggable({"val_prompts": {"gsm8k (hard)": "a", "..": {"x//y": 1}, "größe": 2}})
    assert told == {"val_prompts": {"gsm8k_hard_": "a", "_": {"x_y": 1}, "größe": 2}}


@pytest.mark.parametrize(
    "path",
    [
        "subprocess.Popen",
        "os.system",
        "pathlib.Path",
        "builtins.exec",
        "runpy.run_path",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "transformers.pipeline",
        "lightning_grpo.servers.process.ServerProcess",
        "lightning_grpo.servers.process.subprocess",
        "lightning_grpo._compat_lightning.Popen",
    ],
)
def test_a_checkpoint_s_settings_do_not_name_what_is_run(path):
    for plain in ({"class_path": path, "init_args": {}}, {"function": path}):
        with pytest.raises(CheckpointError, match="so it is not run"):
            hparams.from_plain(plain)
        with pytest.raises(CheckpointError, match="so it is not run"):
            hparams.factory(plain)


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_what_is_installed_elsewhere_is_no_code_of_one_s_own(folder, tmp_path, monkeypatch):
    home = tmp_path / ".local" / folder  # as `pip install --user` and a system's packages
    home.mkdir(parents=True)
    (home / "installed_for_a_user.py").write_text("def run(command):\n    raise SystemExit\n")
    monkeypatch.syspath_prepend(home)
    plain = {"class_path": "installed_for_a_user.run", "init_args": {"command": "id"}}
    with pytest.raises(CheckpointError, match="so it is not run"):
        hparams.from_plain(plain)
