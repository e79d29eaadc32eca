"""RolloutDataModule before a run: what it takes, refuses and passes on."""

from __future__ import annotations

import pickle
import re

import cloudpickle
import pytest
from datasets import Dataset, DatasetDict
from lightning import Trainer
from pandas import DataFrame
from torch.utils.data import DataLoader

from lightning_grpo.agents.workflows import AgentWorkflow
from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError
from lightning_grpo.rollout.producer import has_variance
from lightning_grpo.rollout.prompts import Prompts
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.servers.base import RunningServers
from lightning_grpo.types import Sampling
from lightning_grpo.validation import Evaluation
from tests.fakes.loops import NeverServers, make_data, make_prompts
from tests.fakes.tiny_run import make_group
from tests.fakes.tokenizer import CharTokenizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "`group_size` must be >= 2 (an advantage needs a baseline), got 1."),
        ({"batch_size": 0}, "`batch_size` must be >= 1 (a batch needs a prompt), got 0."),
        ({"max_staleness": -1}, "`max_staleness` must be >= 0 (0 is exactly on-policy), got -1."),
        ({"minibatches_per_batch": 0}, "`minibatches_per_batch` must be >= 1"),
        ({"passes_per_batch": 0}, "`passes_per_batch` must be >= 1"),
        (
            {"batch_size": 4, "minibatches_per_batch": 3},
            "`minibatches_per_batch` must divide `batch_size` (groups are not split), got 3 and 4.",
        ),
    ],
)
def test_sizes_that_can_t_work_are_refused_by_the_constructor(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_data(NeverServers(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation": {"num_samples": 2}}, "`Evaluation(num_samples=4)`, got {'num_samples': 2}"),
        ({"limits": {"max_attempts": 2}}, "`limits` must be an object such as `RolloutLimits("),
        ({"keep_group": True}, "`keep_group` must be an object such as `has_variance`, got True"),
        ({"curriculum": "hard"}, "`curriculum` must be an object such as `Curriculum()`"),
        ({"evaluation": Evaluation}, "got the class Evaluation. Call it."),
    ],
)
def test_what_is_no_part_of_its_kind_is_refused_by_the_constructor(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_data(NeverServers(), **settings)


ROWS = [{"prompt": "2+2="}, {"prompt": "3+3="}]


def make_module_of(**settings):
    workflow = RLVRWorkflow(lambda completion: 1.0)
    given = {"prompts": ROWS, "workflow": workflow, "servers": NeverServers()}
    return RolloutDataModule(**{**given, **settings})


@pytest.mark.parametrize("rows", [ROWS, {"prompt": ["2+2=", "3+3="]}, DataFrame(ROWS)])
def test_rows_alone_are_taken_as_prompts(rows):
    data = make_module_of(prompts=rows, val_prompts={"held_out": rows, "more": Prompts(ROWS)})
    for prompts in (data.prompts[""], data.val_prompts["held_out"], data.val_prompts["more"]):
        assert [prompt.text for prompt in prompts.load(CharTokenizer(False))] == ["2+2=", "3+3="]


def test_a_dataset_of_splits_is_its_training_split_and_not_all_of_them():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])})
    assert len(make_module_of(prompts=splits).prompts[""].load(CharTokenizer())) == 2


def test_a_file_s_name_is_taken_as_prompts(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\n2+2=\n")
    for path in (tmp_path / "rows.csv", str(tmp_path / "rows.csv")):
        assert len(make_module_of(prompts=path).prompts[""].load(CharTokenizer())) == 1


@pytest.mark.parametrize(
    ("urls", "known"),
    [
        ("http://a:30000/", ["http://a:30000"]),
        (["http://a:1", "b:2"], ["http://a:1", "http://b:2"]),
    ],
)
def test_urls_are_taken_as_servers_that_run(urls, known):
    servers = make_module_of(servers=urls).servers
    assert isinstance(servers, RunningServers)
    assert servers.urls == known


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": DataLoader(ROWS)}, "`prompts` must be `Prompts` or what it takes"),
        ({"prompts": 3}, "`prompts` must be `Prompts` or what it takes"),
        ({"prompts": None}, "`prompts` must be `Prompts` or what it takes"),
        ({"prompts": {}}, "`prompts` must name at least one dataset"),
        ({"val_prompts": {"a": iter(ROWS)}}, "`val_prompts.a` must be `Prompts` or what it takes"),
        ({"servers": RunningServers}, "got the class RunningServers. Call it: `RunningServers()`"),
        ({"servers": None}, "`servers` must be servers"),
        ({"servers": []}, "`servers` must be servers"),
        ({"servers": "http://a"}, "`urls` must carry a port"),
        ({"workflow": lambda completion: 1.0}, "becomes one as `RLVRWorkflow(reward)`"),
        ({"workflow": RLVRWorkflow}, "got the class RLVRWorkflow. Call it"),
    ],
)
def test_what_can_t_be_taken_is_refused_by_the_constructor(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_module_of(**settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda settings: RLVRWorkflow(print, settings).sampling,
        lambda settings: AgentWorkflow(lambda base_url: None, sampling=settings).sampling,
        lambda settings: Evaluation(sampling=settings).sampling,
    ],
)
def test_sampling_may_be_given_by_its_settings(make):
    assert make({"max_new_tokens": 48, "stop": ["\n"]}) == Sampling(48, stop=("\n",))
    with pytest.raises(ConfigError, match=r"has no setting 'max_tokens'\. It has max_new"):
        make({"max_tokens": 48})
    with pytest.raises(ConfigError, match="must be a `Sampling`"):
        make(48)


def test_defaults_are_those_of_the_documentation():
    workflow = RLVRWorkflow(lambda completion: 1.0, Sampling())
    data = RolloutDataModule(make_prompts(), workflow, NeverServers())
    assert (data.batch_size, data.group_size, data.max_staleness) == (16, 8, 1)
    assert data.steps_per_rollout == 1
    assert data.evaluation == Evaluation(num_samples=1, greedy=True, sampled=True)
    assert data.val_prompts == {}


def test_groups_are_kept_by_the_constructor_s_function_or_by_a_subclass():
    class Picky(RolloutDataModule):
        def keep_group(self, group):
            return group.prompt.row == 0

    varied, constant = make_group(0, (0.0, 1.0)), make_group(1, (1.0, 1.0))
    assert make_data(NeverServers()).keep_group(constant)
    data = make_data(NeverServers(), keep_group=has_variance)
    assert (data.keep_group(varied), data.keep_group(constant)) == (True, False)
    picky = Picky(make_prompts(), data.workflow, NeverServers())
    assert (picky.keep_group(varied), picky.keep_group(constant)) == (True, False)


def test_one_set_of_held_out_prompts_has_no_name_and_several_keep_theirs():
    one, several = make_prompts(2), {"a": make_prompts(2), "b": make_prompts(3)}
    assert make_data(NeverServers(), val_prompts=one).val_prompts == {"": one}
    assert make_data(NeverServers(), val_prompts=several).val_prompts == several


def test_what_needs_a_run_says_how_to_begin_one():
    data = make_data(NeverServers())
    with pytest.raises(ConfigError, match=r"was not set up.*trainer\.fit.*data\.start"):
        data.describe()
    with pytest.raises(ConfigError, match=r"has no trainer.*trainer\.fit"):
        data.setup("fit")
    data.close()
    data.close()
    assert data.state_dict() == {}
    assert data.health() == {}


class ByStep(RolloutDataModule):
    """A hook that asks the trainer."""

    def keep_group(self, group):
        return self.trainer.global_step > 3


def test_a_hook_that_asks_for_the_trainer_in_another_process_is_told_where_it_can():
    data = make_data(NeverServers(), cls=ByStep)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    there = pickle.loads(cloudpickle.dumps(data))
    with pytest.raises(ConfigError, match=r"`rollouts_in` must be `thread`.*`trainer.global_step`"):
        there.keep_group(make_group())
    data.trainer = None
    assert pickle.loads(cloudpickle.dumps(data)).trainer is None
