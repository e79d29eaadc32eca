"""Run folders as a report reads them, written without a run."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_grpo.rollout.records import write_groups
from lightning_grpo.types import Group, Prompt, Trajectory

BEGAN = 1_800_000_000.0
SETTINGS: dict[str, Any] = {
    "trainer": {"max_steps": 6},
    "model": {
        "class_path": "lightning_grpo.GRPOModule",
        "init_args": {"model": "shipped:quickstart"},
    },
    "data": {"batch_size": 2, "evaluation": {"pass_threshold": 0.5}},
}


def write_metrics(folder: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows as the run's logger writes them: every column, empty where nothing was logged."""
    names = sorted({name for row in rows for name in row})
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def step_row(step: int, **others: float) -> dict[str, object]:
    """What a step logs, as far as a report asks for it; others by `reward__mean`."""
    row: dict[str, object] = {
        "step": step,
        "reward/mean": 0.1 * step,
        "completion/length_mean": 20.0 + step,
        "policy/entropy": 1.0 / step,
        "policy/grad_norm": 0.5,
        "rollout/retried": 0.0,
        "time/step_s": 2.0,
        "time/wait_rollout_s": 0.5,
        "time/forward_backward_s": 1.0,
        "time/optimizer_s": 0.1,
        "time/weight_sync_s": 0.3,
    }
    return row | {name.replace("__", "/"): value for name, value in others.items()}


def write_timeline(folder: Path, lines: Sequence[Mapping[str, object]]) -> None:
    """One object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "timeline.jsonl").write_text(text)


def start_line(step: int = 0, at: float = BEGAN) -> dict[str, object]:
    return {
        "kind": "start",
        "at": at,
        "step": step,
        "described": {"model": "shipped:quickstart (0.46M parameters)"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": "2 cores, 24 GiB",
    }


def span_line(at: float, s: float, what: str, lane: str = "trainer", **more: object) -> dict:
    return {"kind": "span", "at": BEGAN + at, "s": s, "lane": lane, "what": what, **more}


def answer(text: str = "#### 4", reward: float = 1.0, **more: Any) -> Trajectory:
    """An answer of four tokens, whatever its text says."""
    made: dict[str, Any] = {
        "input_ids": (5, 6, 7, 8, 9, 10),
        "response_mask": (False, False, True, True, True, True),
        "logprobs": (0.0, 0.0, -0.1, -2.0, -0.5, 0.0),
        "versions": (-1, -1, 3, 3, 4, 4),
        "reward": reward,
        "rewards": {"right": reward, "form": 1.0},
        "text": text,
        "truncated": False,
    }
    return Trajectory(**(made | more))


def group(row: int, answers: Sequence[Trajectory], asked: str = "", **columns: str) -> Group:
    text = asked or f"What is {row} + {row}?"
    prompt = Prompt(
        input_ids=(5, 6),
        text=f"<|user|>{text}",
        messages=({"role": "user", "content": text},),
        columns={"question": text, "answer": str(2 * row)} | columns,
        row=row,
    )
    return Group(prompt, tuple(answers), admitted_version=4)


def write_batch(
    folder: Path, step: int, groups: Sequence[Group], *, held_out: bool = False
) -> None:
    """One rollout batch, or the answers of one validation."""
    where = folder / "trajectories" / ("held_out" if held_out else "")
    outcome = "held out" if held_out else "trained"
    path = where / f"step_{step:06d}.parquet"
    scored = {} if held_out else {0: (0.0, 0.0, -0.3, -1.5, -0.5, 0.0)}
    write_groups(path, groups, step=step, version=step - 1, outcome=outcome, policy_logprobs=scored)


def ends(low: float, high: float) -> dict[str, object]:
    """Of the held-out score's interval."""
    return {"eval/avg_at_1_ci95_low": low, "eval/avg_at_1_ci95_high": high}


def write_run(folder: Path, steps: int = 6) -> Path:
    """A run that learned: a slow step, a line at it, a validation at both ends, two servers."""
    slow = steps // 2
    rows: list[dict[str, object]] = [
        {"step": 0, "eval/avg_at_1": 0.25, **ends(0.15, 0.35)},
        *(step_row(step) for step in range(1, steps + 1)),
        {"step": steps, "eval/avg_at_1": 0.75, **ends(0.65, 0.85)},
    ]
    rows[slow] = step_row(slow, time__step_s=9.0, time__wait_rollout_s=7.5, rollout__retried=3)
    write_metrics(folder, rows)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    lines = [start_line()]
    at = 0.0
    for step in range(1, steps + 1):
        waited = 7.5 if step == slow else 0.5
        lines += [
            span_line(at, waited, "waiting", step=step),
            span_line(at + waited, 1.0, "forward and backward", step=step),
            span_line(at, waited, "generating", "server 0"),
            span_line(at, waited, "out" if step == slow else "generating", "server 1"),
        ]
        at += waited + 1.5
    said = {"kind": "line", "at": BEGAN + 3, "step": slow, "level": "WARNING"}
    lines += [said | {"text": "server 1 is out"}]
    lines += [{"kind": "end", "at": BEGAN + at, "step": steps, "how": "done", "text": ""}]
    write_timeline(folder, lines)
    for step in range(1, steps + 1):
        groups = [
            group(row, [answer(f"#### {2 * row}"), answer("no idea", 0.0)])
            for row in (2, 10 + step)
        ]
        write_batch(folder, step, groups)
    for step, reward in ((0, 0.0), (steps, 1.0)):
        right = [group(row, [answer(f"#### {2 * row}", reward)]) for row in range(3)]
        wrong = [group(3, [answer("6 it is not: #### 7", 0.0, truncated=True)])]
        write_batch(folder, step, [*right, *wrong], held_out=True)
    return folder
