"""`lightning-grpo show`: read trajectories as a person would."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lightning_grpo.cli.sources import Parser, whole_number
from lightning_grpo.errors import CheckpointError, ConfigError, printable
from lightning_grpo.rollout.records import read_rows

Row = Mapping[str, Any]

SORTS: dict[str, Callable[[Row], float]] = {
    "step": lambda row: row["step"],
    "reward": lambda row: row["reward"],
    "length": lambda row: num_response_tokens(row),
    "staleness": lambda row: staleness(row),
}
"""What trajectories can be ordered by."""


def run(argv: Sequence[str]) -> int:
    """Print some trajectories."""
    options = _parser().parse_args(list(argv))
    if options.limit < 0:
        raise ConfigError(f"`--limit` must be >= 0, got {options.limit}.")
    rows = select(
        read_answers(options.path),
        sort=options.sort,
        reverse=options.reverse,
        limit=options.limit,
        row=options.row,
    )
    show(rows, Console(highlight=False))
    return 0


def read_answers(path: Path) -> list[Row]:
    """What a run was trained on; of one that trained on nothing (`validate`) what it answered.

    Raises:
        ConfigError: There is nothing at that path.
        CheckpointError: What is there holds none.
    """
    if not path.exists():
        raise ConfigError(
            f"`path` must be a .parquet file or a run's folder, and there is no {str(path)!r}."
        )
    try:
        return list(read_rows(path))
    except CheckpointError:
        answered = sorted(
            path.glob("**/trajectories/held_out"), key=lambda each: each.stat().st_mtime
        )
        if not answered:
            raise
    return list(read_rows(answered[-1]))


def _parser() -> argparse.ArgumentParser:
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


def show(rows: Sequence[Row], console: Console) -> None:
    """Print each trajectory: one line about it, the prompt, the completion or all turns."""
    if not rows:
        console.print("no trajectories")
    for row in rows:
        console.rule()
        console.print(Text(printable(headline(row)), style="bold"))
        console.print(Text("prompt", style="bold"))
        console.print(Padding(Text(printable(row["prompt"].strip())), (0, 0, 0, 2)))
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
