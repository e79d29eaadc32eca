"""RolloutDataModule before a run: what it takes, refuses and passes on."""

from __future__ import annotations

import re

import pytest

from lightning_grpo.datamodule import RolloutDataModule
from lightning_grpo.errors import ConfigError
from lightning_grpo.evaluation import Evaluation
from lightning_grpo.rollout.filters import has_variance
from lightning_grpo.rollout.workflow import RLVRWorkflow
from lightning_grpo.types import Sampling
from tests.fakes.loops import NeverServers, make_data, make_prompts
from tests.fakes.tiny_run import make_group


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
