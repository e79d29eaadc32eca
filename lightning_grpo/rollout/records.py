"""Trajectories as Parquet: what a run consumed, readable without torch, and what replay reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_grpo.errors import UnreadableError
from lightning_grpo.types import Group, Outcome, Prompt, RouterShape, Routes, Trajectory

FORMAT = "1"
"""Version of the columns, kept in the file's metadata; readers take no other."""

_FORMAT_KEY = b"lightning_grpo.trajectories"
SCHEMA = pa.schema(
    [
        # where it comes from
        ("step", pa.int64()),  # optimizer steps taken when it was consumed
        ("version", pa.int64()),  # weights that trained on it
        ("pass_index", pa.int64()),
        ("dataset", pa.string()),
        ("row", pa.int64()),
        ("group", pa.int64()),  # position of its group in the rollout batch
        ("outcome", pa.string()),
        # what was asked and answered
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),  # null where none was computed, or one per token
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("truncated", pa.bool_()),
        # token by token
        ("tokens", pa.list_(pa.int32())),
        ("response_mask", pa.list_(pa.bool_())),
        ("logprobs", pa.list_(pa.float32())),
        ("policy_logprobs", pa.list_(pa.float32())),  # when it was trained on; empty if it wasn't
        ("versions", pa.list_(pa.int32())),
        # what replay needs besides
        ("num_prompt_tokens", pa.int64()),
        ("temperature", pa.float64()),
        ("num_turns", pa.int64()),
        ("length_limit", pa.int64()),
        ("transcript", pa.string()),
        ("admitted_version", pa.int64()),
        ("attempts", pa.int64()),
        ("messages", pa.string()),  # JSON
        ("asked", pa.string()),
        ("columns", pa.string()),  # JSON
        ("routes", pa.large_binary()),  # `Routes.experts`; null where nobody asked
        ("router_shape", pa.list_(pa.int32())),  # layers, top_k, experts
    ],
    metadata={_FORMAT_KEY: FORMAT.encode()},
)
"""One row is one trajectory; a group's rows follow each other."""

_FIELDS = [each.name for each in fields(Trajectory) if each.name != "routes"]
_COLUMN = {"input_ids": "tokens", "text": "completion"}
"""Columns that are not named as the trajectory's fields are."""
_FIELD = {column: name for name, column in _COLUMN.items()}
_PER_TOKEN = ("tokens", "response_mask", "logprobs", "policy_logprobs", "versions")
_ONE_VALUE = pa.schema([each for each in SCHEMA if each.name not in _PER_TOKEN])


def write_groups(
    path: Path,
    groups: Sequence[Group],
    *,
    step: int,
    version: int,
    outcome: str = Outcome.TRAINED,
    advantages: Sequence[float] | None = None,
    policy_logprobs: Mapping[int, Sequence[float]] | None = None,
) -> Path:
    """Write groups to one file, whole or not at all.

    Args:
        path: The file; its folder is made.
        groups: What was consumed.
        step: Optimizer steps taken by then.
        version: The weights that trained on it.
        outcome: How the groups ended (an `Outcome`), or what else they are.
        advantages: One for each trajectory, where there are any.
        policy_logprobs: By the number of a trajectory, what the policy gave its tokens when they
            were trained on first.

    Returns:
        `path`.
    """
    rows = [
        row
        for index, group in enumerate(groups)
        for row in _rows(group, index, step=step, version=version, outcome=outcome)
    ]
    if advantages is not None:
        for row, advantage in zip(rows, advantages, strict=True):
            row["advantage"] = advantage
    table = pa.Table.from_pylist(rows, schema=_ONE_VALUE)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    scored = policy_logprobs or {}
    lists: dict[str, list[Sequence[Any]]] = {
        name: [getattr(each, _FIELD.get(name, name)) for each in trajectories]
        for name in _PER_TOKEN
        if name != "policy_logprobs"
    }
    lists["policy_logprobs"] = [scored.get(k, ()) for k in range(len(trajectories))]
    columns = [
        _per_token(lists[field.name], field) if field.name in lists else table[field.name]
        for field in SCHEMA
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name in every process: what a run that was killed here left is taken over when it goes on.
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(pa.table(columns, schema=SCHEMA), unfinished, compression="zstd")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _per_token(lists: Sequence[Sequence[Any]], field: pa.Field) -> pa.Array:
    """A column of lists, by way of numpy: there are a hundred times as many values as rows."""
    lengths = np.fromiter(map(len, lists), np.int32, len(lists))
    offsets = np.concatenate([np.zeros(1, np.int32), lengths.cumsum(dtype=np.int32)])
    values = np.fromiter(
        chain.from_iterable(lists), field.type.value_type.to_pandas_dtype(), offsets[-1]
    )
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=field.type)


def _lists(column: pa.ChunkedArray) -> list[list[Any]]:
    """The same back."""
    joined = column.combine_chunks()
    values = joined.values.to_numpy(zero_copy_only=False).tolist()
    offsets = joined.offsets.to_pylist()
    return [values[start:end] for start, end in pairwise(offsets)]


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, or of a part of one, as `read_rows` gives them."""
    names = [name for name in _PER_TOKEN if name in table.column_names]
    rows = table.drop_columns(names).to_pylist()
    for name in names:
        for row, values in zip(rows, _lists(table[name]), strict=True):
            row[name] = values
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file, or of all files of a folder in order of step.

    Raises:
        CheckpointError: There is none, or it was not written by this package.
    """
    return [row for file in trajectory_files(path) for row in to_rows(read_table(file))]


@dataclass(frozen=True)
class RecordedBatch:
    """One rollout batch as it was consumed.

    Attributes:
        version: The weights that trained on it.
        groups: Its groups, in order.
    """

    version: int
    groups: list[Group]


def read_batch(file: Path) -> RecordedBatch:
    """The rollout batch of one file."""
    by_group: dict[int, list[dict[str, Any]]] = {}
    rows = to_rows(read_table(file, with_routes=True))
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    return RecordedBatch(rows[0]["version"], [_group(part) for part in by_group.values()])


def recorded_version(file: Path) -> int:
    """The weights that trained on a file's rollout batch; reads that column only."""
    version: int = read_table(file, ["version"])["version"][0].as_py()
    return version


def trajectory_files(path: Path) -> list[Path]:
    """The Parquet files at a path: itself, its own, or those of its `trajectories/` folder.

    Of a folder of several versions (`runs/NAME`) it is the last one that trained.

    Raises:
        UnreadableError: There is none.
    """
    if path.is_file():
        return [path]
    versions = sorted(path.glob("version_*/trajectories"), key=_written_at, reverse=True)
    for folder in (path, path / "trajectories", *versions):
        if files := sorted(folder.glob("*.parquet")):
            return files
    raise UnreadableError(
        f"No trajectories at {str(path)!r}: expected a .parquet file, or a folder that holds them "
        "(a run writes `runs/NAME/version_N/trajectories/`)."
    )


def _written_at(folder: Path) -> float:
    return folder.stat().st_mtime


def _rows(
    group: Group, index: int, *, step: int, version: int, outcome: str
) -> Iterator[dict[str, Any]]:
    """The rows of one group."""
    prompt = group.prompt
    shared = {
        "step": step,
        "version": version,
        "pass_index": prompt.pass_index,
        "dataset": prompt.dataset,
        "row": prompt.row,
        "group": index,
        "outcome": str(outcome),
        "prompt": prompt.text,
        "num_prompt_tokens": len(prompt.input_ids),
        "admitted_version": group.admitted_version,
        "attempts": group.attempts,
        "messages": _to_json(list(prompt.messages)),
        "asked": prompt.asked,
        "columns": _to_json(dict(prompt.columns)),
    }
    for trajectory in group.trajectories:
        own = {_COLUMN.get(name, name): getattr(trajectory, name) for name in _FIELDS}
        routes = trajectory.routes
        if routes is not None:
            own |= {"routes": routes.experts, "router_shape": list(astuple(routes.shape))}
        yield {**shared, **own, "rewards": list(trajectory.rewards.items())}


def _group(rows: Sequence[Mapping[str, Any]]) -> Group:
    """A group from its rows."""
    first = rows[0]
    prompt = Prompt(
        input_ids=tuple(first["tokens"][: first["num_prompt_tokens"]]),
        text=first["prompt"],
        messages=tuple(json.loads(first["messages"])),
        columns=json.loads(first["columns"]),
        row=first["row"],
        dataset=first.get("dataset") or "",
        pass_index=first["pass_index"],
        asked=first.get("asked"),
    )
    trajectories = tuple(_trajectory(row) for row in rows)
    return Group(prompt, trajectories, first["admitted_version"], first["attempts"])


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    found = {name: row.get(_COLUMN.get(name, name)) for name in _FIELDS}
    own: Any = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
    own |= {"rewards": dict(row["rewards"]), "transcript": row.get("transcript") or ""}
    if row.get("routes") is not None:
        own["routes"] = Routes(row["routes"], RouterShape(*row["router_shape"]))
    return Trajectory(**own)


def read_table(
    file: Path, columns: list[str] | None = None, *, with_routes: bool = False
) -> pa.Table:
    """One file, if it is one of ours.

    Args:
        file: Written by `write_groups`.
        columns: What is read; None: all.
        with_routes: Whether all includes the experts of each token, of which there may be hundreds.
    """
    try:
        if columns is None:
            names = pq.read_schema(file).names
            columns = [name for name in names if with_routes or name != "routes"]
        table = pq.read_table(file, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableError(f"{str(file)!r} can't be read as Parquet: {error}") from error
    written = (table.schema.metadata or {}).get(_FORMAT_KEY)
    if written != FORMAT.encode():
        raise UnreadableError(
            f"{str(file)!r} does not hold trajectories of this version (its mark is {written!r}, "
            f"expected {FORMAT!r})."
        )
    return table


def _to_json(value: Any) -> str:
    # Columns may hold what JSON does not know (dates, bytes); their text is enough to read.
    return json.dumps(value, default=str, ensure_ascii=False)
