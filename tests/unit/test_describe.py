"""The line that names every precision."""

from __future__ import annotations

import torch

from lightning_grpo.contract import describe_dtypes
from lightning_grpo.datamodule import describe_data
from lightning_grpo.rewards import code, gsm8k
from lightning_grpo.rollout.workflow import PerDatasetWorkflow, RLVRWorkflow
from lightning_grpo.strategies.fsdp2 import FSDP2Strategy
from tests.fakes.loops import NeverServers, make_data, make_trainer


def described(tmp_path, **settings) -> str:
    policy = torch.nn.Linear(2, 2)
    trainer = make_trainer(tmp_path, **settings)
    trainer.optimizers = [torch.optim.SGD(policy.parameters(), lr=0.1)]
    return describe_dtypes(trainer, policy, {"wire": "bfloat16", "server": "auto"})


def test_plain_training_computes_in_what_the_weights_are(tmp_path):
    assert described(tmp_path) == (
        "weights float32, compute float32, gradients float32, optimizer float32, wire bfloat16, "
        "server auto"
    )


def test_autocast_and_the_sharding_policy_are_told(tmp_path):
    assert "compute bfloat16 (autocast), grad" in described(tmp_path, precision="bf16-mixed")
    strategy = FSDP2Strategy(param_dtype="bfloat16", reduce_dtype="float32")
    assert "compute bfloat16, gradients float32, opt" in described(tmp_path, strategy=strategy)
    assert "compute float32, gradients float32, opt" in described(tmp_path, strategy="fsdp2")


def test_a_batch_of_more_prompts_than_there_are_is_said():
    data = make_data(NeverServers(), batch_size=4)
    few = "3 (fewer than a batch of 4: some are asked several times in each), and held out none"
    assert describe_data(data, 3, {})["prompts"] == few
    assert describe_data(data, 4, {})["prompts"] == "4, and held out none"


def test_what_holds_programs_of_the_policy_is_said():
    programs = make_data(NeverServers(), code, batch_size=4)
    assert "resource limits" in describe_data(programs, 4, {})["programs"]
    sampling = programs.workflow.sampling
    several = PerDatasetWorkflow({"": programs.workflow, "sums": RLVRWorkflow(gsm8k, sampling)})
    assert several.runs_programs
    assert "programs" not in describe_data(make_data(NeverServers(), gsm8k), 4, {})
