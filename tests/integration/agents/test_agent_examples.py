"""The examples of turns, tools and an agent: fit on the embedded engine, from their own recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_grpo.rollout.records import read_rows
from lightning_grpo.types import NO_VERSION
from tests.fakes.programs import EXAMPLES, python

SMALL = (
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.val_prompts.limit=4",
    "--data.batch_size=4", "--data.group_size=4",
)  # fmt: skip


def fit(config: Path, base: Path, run: Path, *options: str, timeout_s: float = 110) -> str:
    """Fit a config of an example's folder on a base that its recipe made."""
    paths = {
        "model.model": base / "model",
        "data.prompts.path": base / "data" / "train.jsonl",
        "data.val_prompts.path": base / "data" / "test.jsonl",
        "trainer.default_root_dir": run,
    }
    given = [f"--{key}={value}" for key, value in paths.items()]
    command = ("-m", "lightning_grpo.cli.main", "fit", "--config", config.name)
    return python(config.parent, *command, *given, *options, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Bases that were hardly taught: they run, and no more."""
    found = {}
    for name in ("two_turn", "calculator"):
        found[name] = tmp_path_factory.mktemp(name)
        recipe = EXAMPLES / name / "make_base.py"
        python(recipe.parent, recipe, "--out", found[name], "--clean-steps=2", "--mixed-steps=2")
    return found


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("example", "config"),
    [("two_turn", "two_turn.yaml"), ("two_turn", "agent.yaml"), ("calculator", "calculator.yaml")],
)
def test_an_example_runs_and_only_sampled_tokens_are_trained_on(example, config, bases, tmp_path):
    if config == "agent.yaml":
        pytest.importorskip("openai", reason="needs the extra [openai]")
    printed = fit(EXAMPLES / example / config, bases[example], tmp_path, *SMALL)
    assert len(re.findall(r"^step +\d/2", printed, re.M)) == 2
    assert "maj_at_4" in printed
    (folder,) = tmp_path.rglob("trajectories")
    rows = read_rows(folder)
    assert len(rows) == 2 * 4 * 4
    for row in rows:
        pairs = zip(row["response_mask"], row["logprobs"], row["versions"], strict=True)
        assert all(m or (p == 0.0 and v == NO_VERSION) for m, p, v in pairs)
        assert turns(row["response_mask"]) == row["num_turns"]
    if example == "two_turn":
        assert {row["num_turns"] for row in rows} >= {2}


def turns(mask: list[bool]) -> int:
    """How many runs of sampled tokens there are."""
    return sum(now and not before for before, now in zip([False, *mask], mask, strict=False))


@pytest.fixture(scope="module")
def taught_bases(tmp_path_factory) -> dict[str, Path]:
    """Bases as the recipes make them by default: about two minutes of processor time each."""
    found = {}
    for name in ("two_turn", "calculator"):
        found[name] = tmp_path_factory.mktemp(f"taught_{name}")
        recipe = EXAMPLES / name / "make_base.py"
        python(recipe.parent, recipe, "--out", found[name], timeout_s=900)
    return found


@pytest.mark.slow
@pytest.mark.timeout(2700)
@pytest.mark.parametrize(
    ("example", "config"),
    [("two_turn", "two_turn.yaml"), ("two_turn", "agent.yaml"), ("calculator", "calculator.yaml")],
)
def test_an_example_learns(example, config, taught_bases, tmp_path):
    if config == "agent.yaml":
        pytest.importorskip("openai", reason="needs the extra [openai]")
    printed = fit(EXAMPLES / example / config, taught_bases[example], tmp_path, timeout_s=900)
    held_out = [float(x) for x in re.findall(r"held-out at step \d+ \| avg_at_4 ([\d.]+)", printed)]
    assert held_out[0] < 0.5
    assert held_out[-1] > 0.8
