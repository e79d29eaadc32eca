"""Every number of every public constructor is finite and in its range: a walk over all of them."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import pytest

import lightning_grpo
from lightning_grpo.errors import ConfigError, require_count, require_number, require_seconds
from lightning_grpo.rewards.judge import Judge
from lightning_grpo.rewards.sandbox import CodeLimits
from tests.fakes.tiny_lm import make_lm


def reward(completion: str) -> float:
    """A reward, and a tool: returns a number.

    Args:
        completion: What was answered.
    """
    return float(len(completion))


RECORDS = {
    "Completion", "EpisodeRecord", "Group", "Max", "Mean", "MicroBatch", "Prompt", "RolloutBatch",
    "Sum", "Trajectory",
}  # fmt: skip
"""What the program makes, and nobody writes: checked where it is made."""

NEEDED: dict[str, dict[str, Any]] = {
    "AgentWorkflow": {"agent": lambda base_url: "", "reward": reward},
    "ConstantLength": {"tokens": 8},
    "GRPOModule": {"model": "shipped:quickstart"},
    "Judge": {"url": "http://127.0.0.1:1/v1", "model": "judge"},
    "KLPenalty": {"coefficient": 0.1},
    "MultiTurnWorkflow": {"reward": reward},
    "Objective": {"loss": lightning_grpo.GRPOLoss()},
    "Prompts": {"path": "train.jsonl"},
    "RLVRWorkflow": {"reward": reward},
    "ServerList": {"source": "servers.txt"},
    "ToolWorkflow": {"tools": [reward], "reward": reward},
}
"""What has no default."""

BELOW = {("SGLangServers", "devices"): -2}
SIGNED = {
    ("CISPOLoss", "clip_low"): "1 or more is no lower bound",
    ("Curriculum", "passing_reward"): "a reward",
    ("Evaluation", "pass_threshold"): "a reward",
    ("GRPOModule", "entropy_coefficient"): "a penalty on entropy is one, too",
    ("Judge", "lowest"): "a score",
    ("Judge", "highest"): "a score",
    ("MultiTurnWorkflow", "passing_reward"): "a reward",
    ("Objective", "entropy_coefficient"): "a penalty on entropy is one, too",
    ("Sampling", "top_k"): "-1 is for all tokens",
    ("Truncation", "reward"): "a reward",
    **{(name, "reward_weights"): "what is bad weighs below 0" for name in NEEDED},
}
"""Where -1 is a value like others."""


def needed(cls: type) -> dict[str, Any]:
    if cls.__name__ == "RolloutDataModule":
        prompts = lightning_grpo.Prompts("train.jsonl")
        workflow = lightning_grpo.RLVRWorkflow(reward)
        return {
            "prompts": prompts,
            "workflow": workflow,
            "servers": lightning_grpo.EmbeddedServers(),
        }
    if cls.__name__ == "PackedPolicy":
        return {"model": make_lm()}
    return NEEDED.get(cls.__name__, {})


def kinds(annotation: Any) -> set[Any]:
    """The types of an annotation's values, those inside lists and tuples included."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list, tuple):
        return set().union(*(kinds(each) for each in typing.get_args(annotation)))
    return set() if origin is Literal else {annotation}


def listed(annotation: Any) -> int:
    """How many values a list of numbers has; 0 for what is none."""
    for each in (annotation, *typing.get_args(annotation)):
        origin, arguments = typing.get_origin(each), typing.get_args(each)
        if origin in (list, tuple):
            return len(arguments) if Ellipsis not in arguments else 1
    return 0


def numbers() -> Iterator[tuple[type, str, Any]]:
    public = [getattr(lightning_grpo, name) for name in lightning_grpo.__all__]
    for cls in (*public, Judge, CodeLimits):
        if not inspect.isclass(cls) or cls.__name__ in RECORDS or inspect.isabstract(cls):
            continue
        if "__init__" not in vars(cls) or getattr(cls, "_is_protocol", False):
            continue
        for name, annotation in typing.get_type_hints(cls.__init__).items():
            if {int, float, timedelta} & kinds(annotation):
                yield cls, name, annotation


NUMBERS = list(numbers())


def build(cls: type, name: str, annotation: Any, value: float) -> Any:
    given: Any = value
    if timedelta in kinds(annotation):
        given = timedelta(seconds=min(value, 1e9))
    elif count := listed(annotation):
        given = [value] * count
    return cls(**{**needed(cls), name: given})


def test_the_walk_meets_every_kind_of_number():
    met = {(cls.__name__, name) for cls, name, _ in NUMBERS}
    assert len(met) > 80
    assert {
        ("FSDP2Strategy", "timeout"),
        ("GRPOLoss", "dual_clip"),
        ("RLVRWorkflow", "reward_weights"),
        ("RolloutDataModule", "group_size"),
        ("RolloutLimits", "straggler_timeout_s"),
        ("SGLangServers", "port_range"),
        ("Sampling", "temperature"),
    } <= met


@pytest.mark.parametrize(
    ("cls", "name", "annotation"), NUMBERS, ids=[f"{c.__name__}.{n}" for c, n, _ in NUMBERS]
)
def test_a_number_that_means_nothing_is_refused_by_its_name(cls, name, annotation):
    values = [1e12, 10**12]
    if (cls.__name__, name) not in SIGNED:
        values += [-1, -1.0]
    if timedelta not in kinds(annotation):
        values += [math.nan, math.inf, -math.inf]
    for value in values:
        with pytest.raises(ConfigError, match=rf"`[\w.]*{name}\b") as caught:
            build(cls, name, annotation, value)
        assert len(str(caught.value)) < 300


def test_a_group_of_a_billion_is_refused_and_so_is_a_batch_of_millions_of_groups():
    cls = lightning_grpo.RolloutDataModule
    with pytest.raises(ConfigError, match=r"`group_size` must be <= 65536, got 1000000000\.$"):
        cls(**needed(cls), group_size=10**9)
    with pytest.raises(ConfigError, match=r"`batch_size` x `group_size` must be at most 4194304"):
        cls(**needed(cls), group_size=60_000, batch_size=1000)


def test_a_refusal_names_the_rule_the_value_and_the_way_out():
    with pytest.raises(ConfigError) as caught:
        require_number("eps", 0, above=0, why="it divides", way_out="Way out: 1e-4.")
    assert str(caught.value) == "`eps` must be > 0 (it divides), got 0. Way out: 1e-4."
    for value, rule in (
        (math.nan, "finite"),
        (math.inf, "finite"),
        ("3", "a number"),
        (True, "a number"),
        (None, "a number"),
        (2e9, "<= 1000000000"),
    ):
        with pytest.raises(ConfigError, match=f"`eps` must be {rule}, got {value!r}"):
            require_number("eps", value, above=0)
    with pytest.raises(ConfigError, match=r"`n` must be a whole number, got 2\.0"):
        require_count("n", 2.0)
    with pytest.raises(ConfigError, match="`timeout_s` must be <= 31536000, got"):
        require_seconds("timeout_s", 1e8)


def test_what_is_in_its_range_passes():
    require_number("eps", 1e-9, above=0)
    require_number("low", -3, least=-3)
    require_count("n", 1)
    require_seconds("timeout_s", 0.5)
