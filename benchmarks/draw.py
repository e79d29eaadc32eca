"""Draw the curves that the pages show, from the results that are kept here.

python -m benchmarks.draw          # needs the extra `bench`; writes docs/pictures/*.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "lightning-grpo"  # the same file each time
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def held_out(axes: Any, scores: dict[str, dict[str, float]], name: str, label: str) -> None:
    """Held-out scores by step, with their 95 % intervals."""
    points = sorted((int(step), found) for step, found in scores.items() if name in found)
    steps = [step for step, _ in points]
    values = [found[name] for _, found in points]
    errors = [_below_and_above(found, name) for _, found in points]
    low, high = zip(*errors, strict=True)
    axes.errorbar(steps, values, yerr=(low, high), marker="o", capsize=3, label=label)


def _below_and_above(found: dict[str, float], name: str) -> tuple[float, float]:
    """How far a score's interval reaches; version 0.2 recorded the longer half."""
    value, half = found[name], found.get(f"{name}_ci95", 0.0)
    low, high = (found.get(f"{name}_ci95_{end}") for end in ("low", "high"))
    return half if low is None else value - low, half if high is None else high - value


def main_job(report: dict[str, Any]) -> None:
    """The main job: reward, held-out accuracy, and where a step's time goes."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    for strategy, run in report["strategies"].items():
        curve = run["curve"]
        steps = range(1, len(curve["reward"]) + 1)
        left.plot(steps, curve["reward"], label=strategy)
        for name, label in (("eval/greedy", "greedy"), ("eval/avg_at_1", "sampled")):
            held_out(middle, curve["held_out"], name, f"{strategy}, {label}")
        right.plot(range(1, len(curve["step_s"]) + 1), curve["step_s"], label=f"{strategy}, step")
        right.plot(range(1, len(curve["wait_s"]) + 1), curve["wait_s"], label="waiting", alpha=0.6)
    left.set(title="reward of a rollout batch", xlabel="step")
    middle.set(title="GSM8K, all 1,319 test problems", xlabel="step", ylabel="right")
    right.set(title="seconds", xlabel="step", ylim=(0, None))
    for axes in (left, middle, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save(figure, "h200_main_job")


def learn(report: dict[str, Any]) -> None:
    """A real chat model on the quickstart's problems."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, run in report["runs"].items():
        held_out(axes, run["held_out"], "eval/avg_at_1", name)
    axes.set(title="SmolLM2-135M-Instruct, held-out problems", xlabel="step", ylabel="right")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, "h200_learn")


def save(figure: Any, name: str) -> None:
    """One picture."""
    PICTURES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    print(PICTURES / f"{name}.svg")


def main() -> None:
    """Every picture whose results are there."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for draw in (main_job, learn):
        found = RESULTS / f"h200_{draw.__name__}.json"
        if found.exists():
            draw(json.loads(found.read_text()))


if __name__ == "__main__":
    main()
