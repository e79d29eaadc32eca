"""What a run answered: which groups of its trajectory files a report holds, ready to be shown.

Files can be far larger than a page may be: groups are taken whole, evenly over the steps, and what
is left out is said. Held-out prompts are the same ones at every validation, so that one can see
what became of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lightning_grpo.errors import ConfigError, UnreadableError
from lightning_grpo.report.run import Run
from lightning_grpo.rollout.records import read_table, to_rows
from lightning_grpo.shipped import resolve_path

Row = dict[str, Any]
Key = tuple[str, int]
"""(dataset, row): a prompt, whenever it is asked."""
T = TypeVar("T")

TRAINED, HELD_OUT = "trained", "held-out"
MOST_TRAJECTORIES = 2000
MOST_TOKENS = 1_000_000
"""Tokens of a page that can be coloured; further answers are there as text alone."""
_MOST_FILES = {TRAINED: 100, HELD_OUT: 10}
_HELD_OUT_SHARE = 0.4
_ONE_VALUE = (
    "step",
    "dataset",
    "row",
    "group",
    "completion",
    "reward",
    "rewards",
    "truncated",
    "columns",
    "response_mask",
)
"""What is counted over whole files."""
_LOGPROB_STEPS = 100
_PARENTS = 4


@dataclass
class Answers:
    """The groups that a report holds.

    Attributes:
        groups: Each with its prompt, where it is from, and its answers.
        pieces: Every text of a token that an answer names by its place in here.
        notes: What was left out, and how to get it.
    """

    groups: list[Row] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_trajectories(self) -> int:
        """How many answers there are."""
        return sum(len(group["answers"]) for group in self.groups)


def choose_answers(
    runs: Sequence[Run],
    limit: int = MOST_TRAJECTORIES,
    wanted: Callable[[int], bool] = lambda step: True,
) -> Answers:
    """Take whole groups, evenly over runs and steps, up to about `limit` trajectories.

    Args:
        runs: Whose.
        limit: The most trajectories; a group more where that is less than a group for each run.
        wanted: Whether a step is to be shown.
    """
    out = Answers()
    tables: list[tuple[Run, str, pa.Table]] = []
    for run in runs:
        found = {kind: _files(run, kind, wanted, out.notes) for kind in (TRAINED, HELD_OUT)}
        totals = {kind: sum(f.num_rows for f in files) for kind, files in found.items()}
        taken = 0
        for kind, count in _shares(totals, limit // len(runs)).items():
            for file, rows in _choose(found[kind], kind, count):
                tables += [(run, kind, table) for table in _take(file, rows, out.notes)]
                taken += len(rows)
        if taken < sum(totals.values()):
            out.notes.append(
                f"{run.name}: {taken:,} of {sum(totals.values()):,} trajectories are on this page, "
                "in whole groups and evenly over the steps. --limit N takes more, --steps 10-14 "
                "takes those steps alone."
            )
    num_tokens = sum(_num_response_tokens(table) for *_, table in tables)
    share = min(1.0, MOST_TOKENS / max(1, num_tokens))
    if share < 1:
        out.notes.append(
            f"Tokens of {share:.0%} of the groups can be coloured, evenly over all: they have "
            f"{num_tokens:,}. A smaller --limit, or --steps, keeps more of them."
        )
    places: dict[str, int] = {}
    spell = {run.name: _speller(run, out, places) for run in runs}
    for run, kind, table in tables:
        for rows_ in _group_rows(table):
            index = len(out.groups)
            coloured = int((index + 1) * share) > int(index * share)
            out.groups.append(_group(run, kind, rows_, spell[run.name] if coloured else None))
    return out


def _shares(totals: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many trajectories of each kind; what one kind does not need is the other's."""
    held_out = max(round(limit * _HELD_OUT_SHARE), limit - totals[TRAINED])
    held_out = min(held_out, totals[HELD_OUT])
    return {TRAINED: limit - held_out, HELD_OUT: held_out}


@dataclass(frozen=True)
class _File:
    """A trajectory file and the places of its groups' rows: (place, prompt) -> rows."""

    path: Path
    groups: dict[tuple[int, Key], list[int]]

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.groups.values()))


def _files(run: Run, kind: str, wanted: Callable[[int], bool], notes: list[str]) -> list[_File]:
    """The files to choose from, evenly, the first and the last among them."""
    paths = [f for f in run.trajectory_files(kind == HELD_OUT) if wanted(step_of(f))]
    chosen = spread(paths, _MOST_FILES[kind])
    if len(chosen) < len(paths):
        notes.append(f"{run.name}: {len(chosen)} of {len(paths)} files of {kind} steps were read.")
    files = []
    for path in chosen:
        try:
            files.append(_File(path, _groups(read_table(path, ["group", "dataset", "row"]))))
        except UnreadableError as error:
            notes.append(str(error))
    return files


def _take(path: Path, rows: list[int], notes: list[str]) -> list[pa.Table]:
    """The rows of one file; none, with a note, where they can't be read."""
    try:
        return [read_table(path).take(rows)]
    except UnreadableError as error:
        notes.append(str(error))
        return []


def step_of(file: Path) -> int:
    """The step of a trajectory file, by its name."""
    digits = re.sub(r"\D", "", file.stem)
    return int(digits or 0)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items at even distances, the last and then the first among them."""
    if count >= len(items):
        return list(items)
    if count <= 1:
        return list(items[len(items) - count :])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _choose(files: list[_File], kind: str, count: int) -> list[tuple[Path, list[int]]]:
    """The rows of whole groups out of each file, `count` or a little less."""
    if sum(file.num_rows for file in files) <= count:
        return [(file.path, list(chain.from_iterable(file.groups.values()))) for file in files]
    size = max(len(rows) for file in files for rows in file.groups.values())
    chosen = spread(files, max(1, count // size))
    share, more = divmod(max(len(chosen), count // size), len(chosen))
    common: set[Key] | None = None
    if kind == HELD_OUT:
        shared = set.intersection(*({key[1] for key in file.groups} for file in chosen))
        common = set(spread(sorted(shared), share)) or None
    out = []
    for index, file in enumerate(chosen):
        keys = [key for key in file.groups if common is None or key[1] in common]
        taken = spread(keys, share + (index < more))
        out.append((file.path, [row for key in taken for row in file.groups[key]]))
    return out


def _groups(table: pa.Table) -> dict[tuple[int, Key], list[int]]:
    """The rows of each group: (its place, its prompt) -> places in the table."""
    out: dict[tuple[int, Key], list[int]] = {}
    names = ("group", "dataset", "row")
    columns = [table[name].to_pylist() for name in names]
    for index, (group, dataset, row) in enumerate(zip(*columns, strict=True)):
        out.setdefault((group, (dataset or "", row)), []).append(index)
    return out


def light_rows(file: Path) -> list[Row]:
    """The rows of a file without what there is for each token, but with `length`."""
    table = read_table(file, list(_ONE_VALUE))
    lengths = _lengths(table).tolist()
    rows: list[Row] = to_rows(table.drop_columns(["response_mask"]))
    return [row | {"length": length} for row, length in zip(rows, lengths, strict=True)]


def _lengths(table: pa.Table) -> np.ndarray:
    """How many tokens of each row the policy sampled."""
    column = table["response_mask"].combine_chunks()
    sampled = np.concatenate([[0], np.cumsum(column.values.to_numpy(zero_copy_only=False))])
    offsets = column.offsets.to_numpy()
    return sampled[offsets[1:]] - sampled[offsets[:-1]]


def _num_response_tokens(table: pa.Table) -> int:
    return int(_lengths(table).sum())


# -- one group ------------------------------------------------------------------------------------


def _group_rows(table: pa.Table) -> Iterator[list[Row]]:
    """The rows of one group after the other."""
    for _, rows in groupby(
        to_rows(table), key=lambda row: (row["group"], row["dataset"], row["row"])
    ):
        yield list(rows)


Speller = Callable[[list[int]], list[int]]


def _group(run: Run, kind: str, rows: Sequence[Row], spell: Speller | None) -> Row:
    """One group: the prompt, where it is from, and the answers."""
    first = rows[0]
    asked = _messages(first)
    return {
        "run": run.name,
        "kind": kind,
        "step": first["step"],
        "dataset": first["dataset"] or "",
        "row": first["row"],
        "pass": first["pass_index"],
        "outcome": first["outcome"],
        "prompt": asked,
        "columns": _columns(first, asked),
        "version": first["version"],
        "attempts": first["attempts"],
        "answers": [_answer(row, spell) for row in rows],
    }


def _answer(row: Mapping[str, Any], spell: Speller | None) -> Row:
    sampled = [v for v, on in zip(row["versions"], row["response_mask"], strict=True) if on]
    out: Row = {
        "reward": _json_number(row["reward"]),
        "rewards": {name: _json_number(value) for name, value in dict(row["rewards"]).items()},
        "length": len(sampled),
        "versions": [min(sampled, default=row["version"]), max(sampled, default=row["version"])],
        "truncated": row["truncated"],
        "text": row["completion"],
        "turns": read_turns(row.get("transcript") or ""),
    }
    if row["temperature"] == 0:
        out["greedy"] = True
    if row.get("advantage") is not None:
        out["advantage"] = _json_number(row["advantage"])
    first = row["num_prompt_tokens"]
    if spell is not None:
        out["tokens"] = {
            "pieces": spell(row["tokens"][first:]),
            "logprobs": [_hundredths(value) for value in row["logprobs"][first:]],
            "versions": _runs_of(row["versions"][first:]),
        }
        if scored := row.get("policy_logprobs"):
            pairs = zip(scored[first:], row["logprobs"][first:], strict=True)
            out["tokens"]["moved"] = [_hundredths(now - then) for now, then in pairs]
    return out


def _json_number(value: float) -> float | str:
    """A number that JSON has, or its name."""
    return round(value, 6) if np.isfinite(value) else str(value)


def _hundredths(logprob: float) -> int:
    return round(max(logprob, -1e4) * _LOGPROB_STEPS) if np.isfinite(logprob) else 0


def _runs_of(values: Iterable[int]) -> list[int]:
    """Values that follow each other: value, how often, next value, how often."""
    return [part for value, same in groupby(values) for part in (value, len(list(same)))]


# -- tokens ---------------------------------------------------------------------------------------


def _speller(run: Run, out: Answers, places: dict[str, int]) -> Speller:
    """Gives places in `out.pieces` for token ids; none where there is no tokenizer on this disk."""
    name = str(run.setting("model.model") or "")
    tokenizer = find_tokenizer(name, run.folder)
    if tokenizer is None:
        if run.trajectory_files() or run.trajectory_files(held_out=True):
            out.notes.append(
                f"{run.name}: tokens can't be coloured: the tokenizer of {name or 'its model'} was "
                "not found from this folder, nor from the run's."
            )
        return lambda ids: []

    def spell(ids: list[int]) -> list[int]:
        found = []
        for piece in spelled(tokenizer, ids):
            if piece not in places:
                places[piece] = len(out.pieces)
                out.pieces.append(piece)
            found.append(places[piece])
        return found

    return spell


def find_tokenizer(model: str, run_folder: Path) -> Tokenizer | None:
    """The tokenizer of a model that ships, is a folder, or is in the hub's cache; offline.

    Args:
        model: As the config names it; a relative path is one from where the run was started, which
            is mostly above its folder.
        run_folder: The run's.
    """
    try:
        bases = (Path(), *run_folder.resolve().parents[:_PARENTS]) if model else ()
        folders = [base / resolve_path(model) for base in bases]
        files = [f / "tokenizer.json" for f in folders if (f / "tokenizer.json").is_file()]
        file = files[0] if files else _cached(model)
        return Tokenizer.from_file(str(file)) if file else None
    except Exception:  # noqa: BLE001 - the library raises no other for what it can't read
        return None


def _cached(model: str) -> Path | None:
    """The hub's file of a model that was downloaded before."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(model, "tokenizer.json") if model else None
    return Path(found) if isinstance(found, str) else None


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; of a character of several tokens the last one has it."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, each) or "" for each in ids]


# -- messages -------------------------------------------------------------------------------------

_BEGINS = re.compile(
    r"(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>)([\w-]+)(?:<\|end_header_id\|>)?\n+"
)
_ENDS = re.compile(r"<\|im_end\|>|<end_of_turn>|<\|eot_id\|>|<\|end_of_text\|>|<\|endoftext\|>")
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.S)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.S)
_ROLES = {"model": "assistant", "ipython": "tool"}


def read_turns(transcript: str) -> list[Row]:
    """A conversation from its first sampled token on, turn by turn; [] for a single answer.

    Templates of Qwen's, Llama's and Gemma's kind are known; others stay one text.
    """
    if not transcript:
        return []
    parts = _BEGINS.split(transcript)
    roles = ["assistant", *parts[1::2]]
    turns = [_turn(role, text) for role, text in zip(roles, parts[::2], strict=True)]
    return [turn for turn in turns if turn["text"] or turn["calls"]]


def _turn(role: str, text: str) -> Row:
    text = _ENDS.sub("", text).strip()
    results = _RESULT.findall(text)
    if results and not _RESULT.sub("", text).strip():
        role, text = "tool", "\n".join(results)
    calls = [_call(found) for found in _CALL.findall(text)]
    return {
        "role": _ROLES.get(role, role),
        "text": _CALL.sub("", text).strip() if calls else text,
        "calls": calls,
    }


def _call(text: str) -> str:
    """A call as `name(a=1)`, or as it stands where it can't be read."""
    try:
        found = json.loads(text)
        arguments = found.get("arguments", found.get("parameters", {}))
        inside = ", ".join(f"{k}={json.dumps(v)}" for k, v in arguments.items())
        return f"{found['name']}({inside})"
    except (ValueError, KeyError, AttributeError):
        return text


def _messages(row: Mapping[str, Any]) -> list[Row]:
    """The prompt as chat messages; as one text where it was no chat."""
    found = _json(row["messages"], [])
    messages = [
        {"role": str(each.get("role", "")), "text": _content(each)}
        for each in found
        if isinstance(each, Mapping)
    ]
    return messages or [{"role": "", "text": row["prompt"]}]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else json.dumps(message, ensure_ascii=False)


def _columns(row: Mapping[str, Any], asked: Sequence[Row]) -> Row:
    """The row's other columns: what a reward compares with."""
    known = {message["text"].strip() for message in asked} | {(row.get("asked") or "").strip()}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in _json(row["columns"], {}).items()
    }
    return {name: text for name, text in texts.items() if text.strip() not in known}


def _json(text: Any, default: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return default


def steps_wanted(text: str) -> Callable[[int], bool]:
    """`12`, `10-14` or `0,20,40` as a rule.

    Raises:
        ConfigError: It is none.
    """
    spans = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part)
        if not found:
            raise ConfigError("--steps", "must be steps such as 12, 10-14 or 0,20,40", text)
        spans.append((int(found[1]), int(found[2] or found[1])))
    return lambda step: any(low <= step <= high for low, high in spans)
