"""`lightning-grpo score`: try a reward on recorded completions, as a run would call it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio
from rich.console import Console
from rich.text import Text

from lightning_grpo.checks import require_seconds
from lightning_grpo.cli.mistakes import ImportPathError, import_object
from lightning_grpo.cli.sources import Parser, whole_number
from lightning_grpo.errors import ConfigError, RewardError, printable
from lightning_grpo.rollout.scoring import BoundReward, RewardScorer
from lightning_grpo.rollout.workflow import named_rewards
from lightning_grpo.types import Prompt

_COMPLETION = "completion"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Row:
    """One recorded completion.

    Attributes:
        prompt: What was asked, and the columns.
        completion: What was answered.
        completion_ids: Its token ids, where they were recorded.
        recorded: The reward that was recorded, if any.
    """

    prompt: Prompt
    completion: str
    completion_ids: tuple[int, ...] = ()
    recorded: float | None = None


@dataclass(frozen=True)
class Score:
    """What a reward said of a row: values by name, or why there are none."""

    values: Mapping[str, float]
    error: str = ""

    @property
    def total(self) -> float:
        """The sum of the values."""
        return sum(self.values.values())


def run(argv: Sequence[str]) -> int:
    """Score the rows and print them, with what they come to."""
    options = _parser().parse_args(list(argv))
    check_options(options)
    try:
        bound = BoundReward(import_object(options.reward))
    except ImportPathError as error:
        raise ConfigError(f"--reward: {error}. {error.suggestion}".strip()) from error
    rows = read_completions(options.data)[: options.limit]
    for columns in {tuple(sorted(row.prompt.columns)) for row in rows}:
        bound.validate(columns)
    scorer = RewardScorer([bound.reward], options.processes, options.timeout_s)
    began = time.perf_counter()
    scores = anyio.run(_score_all, bound, rows, scorer)
    elapsed_s = time.perf_counter() - began
    show(rows, scores, elapsed_s, Console(highlight=False), options.show)
    return 1 if any(score.error for score in scores) else 0


def check_options(options: argparse.Namespace) -> None:
    """Refuse what can't be scored with, before the reward is imported.

    Raises:
        ConfigError: Which option, and why.
    """
    if not options.data.exists():
        raise ConfigError(f"`--data` must exist, got {str(options.data)!r}.")
    least = {"limit": 1, "show": 0, "processes": 0}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ConfigError(f"`--{name}` must be >= {smallest}, got {value}.")
    require_seconds("--timeout-s", options.timeout_s)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-grpo score",
        description="Try a reward on recorded completions, without a model.",
        allow_abbrev=False,
    )
    parser.add_argument("--reward", required=True, help="import path: my_rewards.f")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="rows with `completion` and columns (.jsonl, .json), a .parquet of trajectories, or a "
        "run's folder",
    )
    parser.add_argument("--limit", type=whole_number(0), help="only the first so many rows")
    parser.add_argument(
        "--show", type=whole_number(0), default=20, help="how many to print (default: 20)"
    )
    parser.add_argument("--timeout-s", type=float, default=15.0, help="of one call (default: 15)")
    parser.add_argument(
        "--processes", type=whole_number(0), default=2, help="0: in-line, for a debugger"
    )
    return parser


def read_completions(path: Path) -> list[Row]:
    """The completions of a file or folder.

    Raises:
        ConfigError: There is none.
    """
    if path.suffix in (".jsonl", ".json"):
        from lightning_grpo.rollout.prompts import open_rows

        rows = [_from_columns(row) for row in open_rows(str(path))]
    else:
        from lightning_grpo.rollout.records import read_rows

        rows = [_from_trajectory(row) for row in read_rows(path)]
    if not rows:
        raise ConfigError(f"--data: {str(path)!r} has no rows.")
    return rows


def _from_columns(row: Mapping[str, Any]) -> Row:
    if not isinstance(row, Mapping):
        raise ConfigError(f"--data: every row must be a mapping of columns, got {row!r}.")
    columns = dict(row)
    completion = columns.pop(_COMPLETION, columns.pop("completions", None))
    if not isinstance(completion, str):
        raise ConfigError(
            f"--data: every row must have a text `completion`, got the columns {sorted(row)}."
        )
    text, messages = columns.pop("prompt", ""), columns.pop("messages", ())
    if not isinstance(text, str):
        text, messages = json.dumps(text), text
    ids = tuple(columns.pop("completion_ids", ()))
    prompt_ids = tuple(columns.pop("prompt_ids", ()))
    return Row(Prompt(prompt_ids, text, tuple(messages), columns), completion, ids)


def _from_trajectory(row: Mapping[str, Any]) -> Row:
    marked = zip(row["tokens"], row["response_mask"], strict=True)
    prompt = Prompt(
        tuple(row["tokens"][: row["num_prompt_tokens"]]),
        row["prompt"],
        tuple(json.loads(row["messages"])),
        json.loads(row["columns"]),
        row=row["row"],
        asked=row.get("asked"),
    )
    ids = tuple(token for token, sampled in marked if sampled)
    return Row(prompt, row["completion"], ids, row["reward"])


async def _score_all(bound: BoundReward, rows: Sequence[Row], scorer: RewardScorer) -> list[Score]:
    scores: dict[int, Score] = {}

    async def score(index: int, row: Row) -> None:
        arguments = bound.arguments(row.prompt, row.completion, row.completion_ids)
        try:
            value = await scorer.score(bound.reward, arguments)
        except RewardError as error:
            scores[index] = Score({}, str(error))
        else:
            scores[index] = Score(named_rewards(bound.name, value))

    try:
        async with scorer, anyio.create_task_group() as tasks:
            for index, row in enumerate(rows):
                tasks.start_soon(score, index, row)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return [scores[index] for index in range(len(rows))]


def show(
    rows: Sequence[Row], scores: Sequence[Score], elapsed_s: float, console: Console, most: int
) -> None:
    """Print the first rows, then what all come to."""
    for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
        if index < most:
            console.print(Text(_line(index, row, score)), soft_wrap=True)
    if len(rows) > most:
        console.print(f"... and {len(rows) - most} more")
    good = [score for score in scores if not score.error]
    console.print(
        f"{len(good)} scored in {elapsed_s:.1f} s, {len(scores) - len(good)} failed", style="bold"
    )
    for name in dict.fromkeys(name for score in good for name in score.values):
        values = [score.values[name] for score in good if name in score.values]
        console.print(
            f"{name}: mean {fmean(values):.4g}, from {min(values):.4g} to {max(values):.4g}"
        )
    pairs = [(r.recorded, s.total) for r, s in zip(rows, scores, strict=True) if not s.error]
    changed = sum(recorded is not None and recorded != total for recorded, total in pairs)
    if any(recorded is not None for recorded, _ in pairs):
        console.print(f"{changed} of {len(pairs)} differ from the recorded reward")
    failed = next((score.error for score in scores if score.error), "")
    if failed:
        console.print(Text(printable(f"first failure: {failed}"), style="red"), soft_wrap=True)


def _line(index: int, row: Row, score: Score) -> str:
    if score.error:
        value = "failed"
    elif len(score.values) == 1:
        value = f"{score.total:.4g}"
    else:
        value = ", ".join(f"{name} {number:.4g}" for name, number in score.values.items())
    end = printable(" ".join(row.completion[-4 * _SHOWN_CHARACTERS :].split()))
    cut = "..." if len(end) > _SHOWN_CHARACTERS else ""
    recorded = "" if row.recorded is None else f"  (recorded {row.recorded:.4g})"
    return f"{index:>5}  {value}{recorded}  {cut}{end[-_SHOWN_CHARACTERS:]}"
