"""`lightning-grpo show`: read trajectories as a person would; `score`: try a reward on them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lightning_grpo.cli.mistakes import import_object
from lightning_grpo.cli.sources import ConfigProblem, Parser, whole_number
from lightning_grpo.errors import (
    CheckpointError,
    ConfigError,
    RewardError,
    UnreadableError,
    printable,
    require_seconds,
)
from lightning_grpo.rollout.prompts import open_rows
from lightning_grpo.rollout.records import read_rows
from lightning_grpo.rollout.scoring import BoundReward, RewardScorer
from lightning_grpo.rollout.workflow import named_rewards
from lightning_grpo.types import Prompt

Row = Mapping[str, Any]

SORTS: dict[str, Callable[[Row], float]] = {
    "step": lambda row: row["step"],
    "reward": lambda row: row["reward"],
    "length": lambda row: num_response_tokens(row),
    "staleness": lambda row: staleness(row),
}
"""What trajectories can be ordered by."""


def show(argv: Sequence[str]) -> int:
    """Print some trajectories."""
    options = _show_parser().parse_args(list(argv))
    if options.limit < 0:
        raise ConfigError("--limit", "must be >= 0", options.limit)
    rows = select(
        read_answers(options.path, held_out=options.held_out),
        sort=options.sort,
        reverse=options.reverse,
        limit=options.limit,
        row=options.row,
    )
    show_rows(rows, Console(highlight=False))
    return 0


def read_answers(path: Path, *, held_out: bool = False) -> list[Row]:
    """What a run was trained on; of one that trained on nothing (`validate`) what it answered.

    Args:
        path: A file, a folder of them, or a run's.
        held_out: Whether the answers to held-out prompts are wanted, of the run's last version.

    Raises:
        ConfigError: There is nothing at that path.
        CheckpointError: What is there holds none.
    """
    if not path.exists():
        raise ConfigError(
            f"`path` must be a .parquet file or a run's folder, and there is no {str(path)!r}."
        )
    refusal: CheckpointError | None = None
    if not held_out:
        try:
            return list(read_rows(path))
        except CheckpointError as error:
            refusal = error
    answered = sorted(path.glob("**/held_out"), key=lambda each: each.stat().st_mtime)
    if not answered:
        raise refusal or UnreadableError(f"{str(path)!r} holds no answers to held-out prompts.")
    return list(read_rows(answered[-1]))


def _show_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-grpo show",
        description="Print the trajectories of a Parquet file, a folder of them, or a run.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, help="a .parquet file, or a run's folder (runs/NAME)")
    parser.add_argument(
        "--limit", type=whole_number(0), default=10, help="how many to print (default: 10)"
    )
    parser.add_argument("--sort", choices=sorted(SORTS), default="step", help="the order")
    parser.add_argument("--reverse", action="store_true", help="largest first")
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="the answers to held-out prompts in place of what was trained on",
    )
    parser.add_argument("--row", type=whole_number(0), help="only this row of the prompts")
    return parser


def select(
    rows: Sequence[Row],
    *,
    sort: str = "step",
    reverse: bool = False,
    limit: int = 10,
    row: int | None = None,
) -> list[Row]:
    """The trajectories asked for, in the order asked for."""
    chosen = [r for r in rows if row is None or r["row"] == row]
    return sorted(chosen, key=SORTS[sort], reverse=reverse)[:limit]


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print each trajectory: one line about it, the prompt, the completion or all turns."""
    if not rows:
        console.print("no trajectories")
    for row in rows:
        console.rule()
        console.print(Text(printable(headline(row)), style="bold"))
        console.print(Text("prompt", style="bold"))
        console.print(Padding(Text(printable(row["prompt"].strip())), (0, 0, 0, 2)))
        for name, value in json.loads(row.get("columns") or "{}").items():
            said = Text(printable(f"{name}: {value}".replace("\n", " ")), style="dim")
            said.truncate(_COLUMN_CHARACTERS, overflow="ellipsis")
            console.print(Padding(said, (0, 0, 0, 2)))
        ending = " (truncated)" if row["truncated"] else ""
        several = row.get("transcript")
        console.print(Text(f"{'turns' if several else 'completion'}{ending}", style="bold"))
        console.print(
            Padding(Text(printable((several or row["completion"]).strip())), (0, 0, 0, 2))
        )
        console.print()


def headline(row: Row) -> str:
    """What there is to know about one trajectory, in one line."""
    rewards = dict(row["rewards"])
    named = ", ".join(f"{name} {value:.3g}" for name, value in rewards.items())
    reward = f"reward {row['reward']:.3g}" + (f" ({named})" if len(rewards) > 1 else "")
    sampled = sampled_versions(row)
    versions = f"{sampled[0]}" if len(sampled) == 1 else f"{sampled[0]}-{sampled[-1]}"
    parts = [
        f"step {row['step']}",
        f"pass {row['pass_index']} row {row['row']}",
        reward,
        *([f"advantage {row['advantage']:.3g}"] if row.get("advantage") is not None else []),
        f"{num_response_tokens(row)} tokens",
        f"weights {versions}, staleness {staleness(row)}",
        row["outcome"],
    ]
    return " | ".join(parts)


def num_response_tokens(row: Row) -> int:
    """How many tokens the policy sampled."""
    return sum(row["response_mask"])


def sampled_versions(row: Row) -> list[int]:
    """The weight versions that sampled its tokens, in order, each once."""
    pairs = zip(row["versions"], row["response_mask"], strict=True)
    return sorted({version for version, sampled in pairs if sampled}) or [row["version"]]


def staleness(row: Row) -> int:
    """How many versions older than the weights that trained on it its oldest token is."""
    return int(row["version"] - sampled_versions(row)[0])


_COLUMN_CHARACTERS = 160
_COMPLETION = "completion"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Recorded:
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


def score(argv: Sequence[str]) -> int:
    """Score the rows and print them, with what they come to."""
    options = _score_parser().parse_args(list(argv))
    check_options(options)
    try:
        bound = BoundReward(import_object(options.reward))
    except ConfigProblem as error:
        raise ConfigError(f"--reward: {error.rule}. {error.way_out}".strip()) from error
    rows = read_completions(options.data)[: options.limit]
    for columns in {tuple(sorted(row.prompt.columns)) for row in rows}:
        bound.validate(columns)
    scorer = RewardScorer([bound.reward], options.processes, options.timeout_s)
    began = time.perf_counter()
    scores = anyio.run(_score_all, bound, rows, scorer)
    elapsed_s = time.perf_counter() - began
    show_scores(rows, scores, elapsed_s, Console(highlight=False), options.show)
    return 1 if any(score.error for score in scores) else 0


def check_options(options: argparse.Namespace) -> None:
    """Refuse what can't be scored with, before the reward is imported.

    Raises:
        ConfigError: Which option, and why.
    """
    if not options.data.exists():
        raise ConfigError("--data", "must exist", str(options.data))
    least = {"limit": 1, "show": 0, "processes": 0}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ConfigError(f"--{name}", f"must be >= {smallest}", value)
    require_seconds("--timeout-s", options.timeout_s)


def _score_parser() -> argparse.ArgumentParser:
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


def read_completions(path: Path) -> list[Recorded]:
    """The completions of a file or folder.

    Raises:
        ConfigError: There is none.
    """
    if path.suffix in (".jsonl", ".json"):
        rows = [_from_columns(row) for row in open_rows(str(path))]
    else:
        rows = [_from_trajectory(row) for row in read_rows(path)]
    if not rows:
        raise ConfigError(f"--data: {str(path)!r} has no rows.")
    return rows


def _from_columns(row: Mapping[str, Any]) -> Recorded:
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
    return Recorded(Prompt(prompt_ids, text, tuple(messages), columns), completion, ids)


def _from_trajectory(row: Mapping[str, Any]) -> Recorded:
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
    return Recorded(prompt, row["completion"], ids, row["reward"])


async def _score_all(
    bound: BoundReward, rows: Sequence[Recorded], scorer: RewardScorer
) -> list[Score]:
    scores: dict[int, Score] = {}

    async def score_row(index: int, row: Recorded) -> None:
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
                tasks.start_soon(score_row, index, row)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return [scores[index] for index in range(len(rows))]


def show_scores(
    rows: Sequence[Recorded], scores: Sequence[Score], elapsed_s: float, console: Console, most: int
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


def _line(index: int, row: Recorded, score: Score) -> str:
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
