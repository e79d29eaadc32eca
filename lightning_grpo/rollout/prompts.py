"""Prompts: rows of a dataset as chat messages and token ids, and where rows come from."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lightning_grpo.errors import ConfigError, PromptError, require_number, require_on_hub
from lightning_grpo.rollout import chat
from lightning_grpo.rollout.chat import Tokenizer
from lightning_grpo.types import Prompt

Rows = Sequence[Mapping[str, Any]]
_DEFAULT_SPLIT = "train"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


# What looks like a file: not asked for on the hub, which takes half a minute to give up.
FILES = (
    ".json",
    ".jsonl",
    ".parquet",
    ".csv",
    ".tsv",
    ".txt",
    ".arrow",
    ".gz",
    ".zip",
    ".zst",
)


if TYPE_CHECKING:
    from typing_extensions import runtime_checkable

    Source = str

    @runtime_checkable
    class Table(Protocol):
        """Rows, columns or datasets by name, a DataFrame, a `Dataset`."""

        def __len__(self) -> int:
            """How many."""
            ...

        def __getitem__(self, key: Any, /) -> Any:
            """One of them."""
            ...

else:

    class Table:
        """Rows, or columns by name, that stand in a config: no parser may read their cells."""

        def __new__(cls, rows: Any) -> Any:
            """Refuse what is neither."""
            is_rows = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
            if not (rows and is_rows) and not is_columns(rows):
                raise ValueError("neither rows nor columns")
            return rows

    class Source(str):
        """The name of a dataset, so that a config tells it from the import path of a class."""

        __slots__ = ()

        def __new__(cls, text: str) -> str:
            """Refuse what may be anything."""
            if not isinstance(text, str):
                raise TypeError("not a name")
            is_name = (
                text.startswith("shipped:") or "/" in text or Path(text).suffix.lower() in FILES
            )
            if not (is_name or Path(text).exists()):
                raise ValueError("not the name of a dataset, a file or a folder")
            return text


def open_rows(path: Any, name: str | None = None, split: str = "train") -> Rows:
    """Rows of a hub dataset, a file, a folder, or whatever already holds rows or columns.

    Raises:
        ConfigError: There is no such source, split or format.
    """
    if not isinstance(path, str | Path):
        return _in_memory(path, split)
    if str(path).strip() in ("", "/", ".", ".."):
        raise ConfigError(
            f"`path` must name a file, a folder with a dataset or a dataset of the hub, got "
            f"{str(path)!r}."
        )
    resolved = Path(_resolve(str(path)))
    if resolved.is_file():
        _require_split(split, resolved.name)
        return _read_file(resolved)
    if (resolved / "state.json").is_file() or (resolved / "dataset_dict.json").is_file():
        import datasets

        return _pick_split(datasets.load_from_disk(str(resolved)), split, resolved.name)
    refuse_missing(str(path))
    if not resolved.exists():
        require_on_hub("path", str(path), "dataset")
    return _load_dataset(str(path), str(resolved), name, split)


def refuse_missing(path: str) -> None:
    """Refuse the name of a file of rows that is not there; others may be a folder or the hub's.

    Raises:
        ConfigError: There is no such file.
    """
    resolved = Path(_resolve(path))
    if resolved.suffix.lower() in FILES and not resolved.is_file():
        raise ConfigError(f"`path` must name an existing file, folder or dataset, got {path!r}.")


def is_columns(source: Any) -> bool:
    """Whether a dictionary holds columns by name, rather than datasets by name."""
    if not isinstance(source, Mapping):
        return False
    return any(_is_list(each) and len(each) and _is_cell(each[0]) for each in source.values())


def _is_list(value: Any) -> bool:
    sized = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return sized and not isinstance(value, str | bytes | Mapping) and not hasattr(value, "columns")


def _is_cell(value: Any) -> bool:
    return not isinstance(value, Mapping)


def _in_memory(source: Any, split: str) -> Rows:
    """Rows of a dataset, a list, a dictionary of columns, or a table of pandas, polars or Arrow."""
    found: Any = source
    if is_columns(found):
        _require_split(split)
        return _ColumnRows(found)
    found = _pick_split(found, split)
    if hasattr(found, "iloc") and hasattr(found, "columns"):  # pandas
        return found.to_dict("records")
    for method in ("to_dicts", "to_pylist"):  # polars, Arrow
        if hasattr(found, method):
            return getattr(found, method)()
    if hasattr(found, "dataset") and hasattr(found, "batch_size"):
        raise ConfigError(
            "`path` must hold rows, and a DataLoader gives batches of them. Give its dataset "
            "(`loader.dataset`); order and batches are this package's (`shuffle`, `batch_size`)."
        )
    if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise ConfigError(
            "`path` must be the name of a dataset or file, a dataset, a list of rows, columns by "
            f"name or a DataFrame, got {type(found).__name__}. Rows that come one after another "
            "are taken as `list(rows)`."
        )
    return found


class _ColumnRows(Sequence[Mapping[str, Any]]):
    """Rows of columns by name."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = columns
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"`path` must hold columns of one length, got {lengths}.")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: Any) -> Any:
        return {name: column[row] for name, column in self._columns.items()}


def _resolve(path: str) -> str:
    if not path.startswith("shipped:"):
        return path
    from lightning_grpo.shipped import resolve_path

    return resolve_path(path)


def _load_dataset(asked: str, path: str, name: str | None, split: str) -> Rows:
    import datasets

    try:
        loaded: Any = datasets.load_dataset(path, name, split=split)
    except Exception as error:
        # Whatever the library or a file's reader raises is about what was named.
        raise ConfigError(
            f"the dataset `path` {asked!r} (name={name!r}, split={split!r}) could not be loaded: "
            f"{error}"
        ) from error
    return loaded


def _read_file(path: Path) -> Rows:
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _ParquetRows(path)
    if ending not in (".json", ".jsonl", *_DELIMITERS):
        raise ConfigError(
            "`path` must end in .json, .jsonl, .parquet, .csv or .tsv, got "
            f"{str(path)!r}. Convert it, or give the rows themselves."
        )
    return _read_text(path, ending)


def _read_text(path: Path, ending: str) -> Rows:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"`path` must name a file in UTF-8, got {str(path)!r}: {error}. Save it as UTF-8."
        ) from error
    if ending == ".jsonl":
        # Not splitlines(): JSON allows U+2028 and its like unescaped inside a string.
        lines = enumerate(text.split("\n"), start=1)
        return [_parse(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if ending in _DELIMITERS:
        return _read_table(text, str(path), _DELIMITERS[ending])
    rows = _parse(text, str(path))
    if isinstance(rows, list) or is_columns(rows):
        return rows if isinstance(rows, list) else _ColumnRows(rows)
    raise ConfigError(f"{path} must hold a list of rows, got {type(rows).__name__}.")


def _read_table(text: str, where: str, delimiter: str) -> Rows:
    """Rows of text: what a cell says is never read as a number, `007` and `1,000` among them."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell may be a whole document
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                header = list(reader.fieldnames or ())[:9]
                raise csv.Error(f"it has another number of cells than the header {header}")
            rows.append(row)
    except csv.Error as error:
        raise ConfigError(
            f"{where}:{reader.line_num} is no row of a table: {error}. A cell that holds the "
            "delimiter stands in quotes."
        ) from error
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where} is not JSON: {error}. A .jsonl file has one object a line, a .json file a "
            "list of them."
        ) from error


def _pick_split(source: Any, split: str, name: str = "") -> Rows:
    """The rows of a split, where the source has splits (a dictionary of them)."""
    if not isinstance(source, Mapping):
        _require_split(split, f"{name} {getattr(source, 'split', '')}")
        return source
    if split not in source:
        raise ConfigError(f"`split` must be one of {sorted(source)}, got {split!r}.")
    return source[split]


def _require_split(split: str, told: str = "") -> None:
    """Refuse a split of what has none, unless its name says that it is the one.

    So `test.jsonl` may stand in the place of a hub's dataset whose split is `test`.
    """
    if split != _DEFAULT_SPLIT and split not in re.findall(r"[^\W_]+", told):
        raise ConfigError(
            f"`split` must be left out, or be `{_DEFAULT_SPLIT}`, where `path` has no splits (all "
            f"of its rows are asked), got {split!r}. Give what holds that split alone, or `limit`."
        )


class _ParquetRows(Sequence[Mapping[str, Any]]):
    """Rows of a Parquet file, made one at a time from its columns."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowInvalid, OSError) as error:  # also of one that was cut off
            raise ConfigError(
                f"`path` must name a Parquet file, got {str(path)!r}: {error}."
            ) from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: Any) -> Any:
        return self._table.slice(row, 1).to_pylist()[0]


MakePrompt = Callable[[Mapping[str, Any]], Prompt]
_NATURAL_NAMES = ("prompt", "messages")


class Prompts:
    """Where prompts come from and how a row becomes one. Nothing is read before `load`.

    Args:
        path: Hub name, file (.json, .jsonl, .parquet, .csv, .tsv; a table's cells stay text),
            folder, `shipped:NAME`, or what is in memory: a `datasets.Dataset`, a list of rows,
            columns by name, a DataFrame.
        name: Configuration of the dataset, where it has several.
        split: Which split, of what has several.
        column: The column to ask: text, or a list of chat messages (ShareGPT's keys and JSON text
            are understood). An answer of the assistant at their end is continued.
        system: System message put first.
        suffix: Text added to the end of the last message of the user.
        transform: Changes a row before anything else reads it.
        limit: Use the first so many rows.
        shuffle: Whether each pass has its own seeded order.
        seed: Of the order, and of what is sampled; None: the run's (`seed_everything`), else 0.
        weight: Share of the prompts asked, relative to the other datasets of the run.
        too_long: What to do with a prompt that leaves no room for `max_new_tokens`: `error` names
            the rows, `skip` leaves them out and counts them.
        template_kwargs: Variables of the tokenizer's chat template, such as
            `{"enable_thinking": False}`; every turn of an episode is rendered with them.
    """

    def __init__(  # noqa: PLR0913 - config surface: what a YAML file may set
        self,
        path: str | Sequence[Mapping[str, Any]] | Any,
        name: str | None = None,
        split: str = _DEFAULT_SPLIT,
        column: str = "prompt",
        system: str | None = None,
        suffix: str | None = None,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        limit: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        weight: float = 1.0,
        too_long: Literal["error", "skip"] = "error",
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if limit is not None:
            require_number("limit", limit, least=1, whole=True, way_out="Null is for every row.")
        if seed is not None:
            require_number("seed", seed, least=0, most=2**32 - 1, whole=True)
        require_number(
            "weight",
            weight,
            above=0,
            why="a share of the prompts asked",
            way_out="Way out: leave the dataset out.",
        )
        if too_long not in ("error", "skip"):
            raise ConfigError(f"`too_long` must be 'error' or 'skip', got {too_long!r}.")
        self.path = path
        self.name = name
        self.split = split
        self.column = column
        self.system = system
        self.suffix = suffix
        self.transform = transform
        self.limit = limit
        self.shuffle = shuffle
        self.seed = run_seed() if seed is None else seed
        self.weight = weight
        self.too_long = too_long
        self.template_kwargs = dict(template_kwargs or {})
        chat.check_arguments(self.template_kwargs)

    def load(
        self,
        tokenizer: Tokenizer,
        make_prompt: MakePrompt | None = None,
        max_prompt_tokens: int | None = None,
        name: str = "",
        vocabulary: Vocabulary | None = None,
    ) -> PromptSet:
        """Open the rows; each is rendered and tokenized when it is asked for.

        Args:
            tokenizer: Renders and encodes.
            make_prompt: Takes the place of `self.make_prompt(row, tokenizer)`.
            max_prompt_tokens: What the context leaves beside `max_new_tokens`; None: no limit.
            name: Of the dataset, where there are several.
            vocabulary: Ids that the model knows; None: all.

        Raises:
            ConfigError: No such source or column, no rows, or rows that can't be asked.
        """
        chat.with_arguments(tokenizer, self.template_kwargs)  # refuses what it doesn't know
        rows = open_rows(self.path, self.name, self.split)
        make = make_prompt or (lambda row: self.make_prompt(row, tokenizer))
        loaded = PromptSet(self, rows, make, max_prompt_tokens, name, vocabulary)
        loaded.check(column=self.column if make_prompt is None else None)
        return loaded

    def make_prompt(self, row: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
        """Render and tokenize one (transformed) row; token ids are made here and never again."""
        tokenizer = chat.with_arguments(tokenizer, self.template_kwargs)
        content = self._content(row[self.column])
        columns = {k: v for k, v in row.items() if k != self.column or k not in _NATURAL_NAMES}
        if isinstance(content, str) and not tokenizer.chat_template:
            text = "".join(part for part in (self.system, content, self.suffix) if part)
            ids = tuple(chat.prompt_ids(tokenizer, text))
            return Prompt(ids, text, columns=columns, asked=text)
        messages = chat.without_blank_answer(self._messages(content))
        asked = f"{content}{self.suffix or ''}" if isinstance(content, str) else None
        if not tokenizer.chat_template:
            raise ConfigError(
                f"column {self.column!r} holds chat messages, but the tokenizer has no chat "
                "template. Use a column of text, or a chat model's tokenizer."
            )
        how = chat.rendering(messages)
        said = chat.fitting(tokenizer, messages, how)
        text = tokenizer.apply_chat_template(said, tokenize=False, **how)
        ids = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False, **how)
        return Prompt(tuple(ids), text, tuple(messages), columns, asked=asked)

    def _content(self, value: Any) -> str | list[dict[str, Any]]:
        try:
            return chat.read_content(value)
        except ConfigError as error:
            raise ConfigError(f"column {self.column!r} can't be asked: {error}") from None

    def _messages(self, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        messages = content
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self.suffix:
            asking = [message for message in messages if message["role"] == "user"]
            if not asking:
                raise ConfigError(
                    "`suffix` needs a message of the user to stand at the end of, got the roles "
                    f"{[message['role'] for message in messages]}. Add it with `transform`."
                )
            asking[-1]["content"] += self.suffix
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages


@dataclass(frozen=True)
class Vocabulary:
    """Which token ids the model has an embedding for.

    Attributes:
        size: Rows of the embedding.
        beyond: Tokens of the tokenizer that have none; rows that hold one are looked at first.
    """

    size: int
    beyond: tuple[str, ...] = ()


Asked = Prompts | Source | Table
"""One dataset, as a config may write it."""


def by_name(prompts: Any, setting: str = "prompts", required: bool = False) -> dict[str, Prompts]:
    """Datasets by name; one alone has the empty name.

    Args:
        prompts: `Prompts`, what `Prompts` takes, or several of either by name; None is none.
        setting: The name of the setting.
        required: Whether None is refused.

    Raises:
        ConfigError: It is nothing to ask.
    """
    if prompts is None and not required:
        return {}
    if isinstance(prompts, dict) and not prompts:
        raise ConfigError(f"`{setting}` must name at least one dataset, got {{}}. Or give one.")
    # Splits and columns come as dictionaries, too.
    if type(prompts) is dict and not is_columns(prompts):
        return {name: _as_prompts(each, f"{setting}.{name}") for name, each in prompts.items()}
    return {"": _as_prompts(prompts, setting)}


def _as_prompts(given: Any, setting: str) -> Prompts:
    if isinstance(given, Prompts):
        return given
    try:
        if not isinstance(given, str | Path):
            open_rows(given)  # what is named is looked for when it is opened
        return Prompts(given)
    except ConfigError as error:
        raise ConfigError(f"`{setting}` must be `Prompts` or what it takes: {error}") from error


class PromptSet:
    """The opened rows of `Prompts`: `len`, `columns`, and one prompt at a time."""

    def __init__(
        self,
        prompts: Prompts,
        rows: Sequence[Mapping[str, Any]],
        make: MakePrompt,
        max_prompt_tokens: int | None,
        name: str = "",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.prompts = prompts
        self.name = name
        self.max_prompt_tokens = max_prompt_tokens
        self.num_too_long = 0
        self._rows = rows
        self._make = make
        self._vocabulary = vocabulary
        limit = len(rows) if prompts.limit is None else min(prompts.limit, len(rows))
        self._index: Sequence[int] = range(limit)

    def __len__(self) -> int:
        """How many prompts one pass has."""
        return len(self._index)

    def prompt(self, row: int, pass_index: int = 0) -> Prompt:
        """The prompt at a position of the (unshuffled) set.

        Raises:
            PromptError: The row can't be made one.
        """
        made = self._made(self._index[row])
        if self.max_prompt_tokens is not None and len(made.input_ids) > self.max_prompt_tokens:
            raise PromptError(self._too_long_message({row: len(made.input_ids)}))
        return replace(
            made,
            row=row,
            pass_index=pass_index,
            dataset=self.name,
            template_kwargs=made.template_kwargs or self.prompts.template_kwargs,
        )

    def __getitem__(self, row: int) -> Prompt:
        """The prompt at a position, of pass 0; makes the set iterable."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.prompt(row)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that rewards may ask for (those of the first row)."""
        return tuple(self.prompt(0).columns)

    def check(self, column: str | None) -> None:
        """Refuse an unknown column, an empty set, and rows that can't be asked.

        Every row is looked at, few are tokenized: those that are left can still turn out to be
        none, and are given up by name when their turn comes.

        Args:
            column: The column that every row must have, if any.
        """
        if not len(self):
            raise ConfigError(f"{self._source} has no rows. Name a dataset with one at least.")
        self._require(column, 0)
        overhead = len(self._made(0).input_ids)
        too_long: dict[int, int] = {}
        unusable: dict[int, PromptError] = {}
        for row in self._index:
            try:
                num_tokens = self._num_tokens(column, row, overhead)
            except PromptError as error:
                unusable[row] = error
                continue
            if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
                too_long[row] = num_tokens
        if unusable:
            raise ConfigError(self._unusable_message(unusable))
        if too_long and self.prompts.too_long == "error":
            raise ConfigError(self._too_long_message(too_long))
        self.num_too_long = len(too_long)
        self._index = [row for row in self._index if row not in too_long]
        if not self._index:
            raise ConfigError(self._too_long_message(too_long))

    def _num_tokens(self, column: str | None, row: int, overhead: int) -> int:
        """Tokens of a row's prompt; 0 where they are surely within the limit.

        A token is at least one byte of text, so only rows with that many bytes are tokenized: for
        short questions and a long context that is none of them. What looks suspicious is, too.

        Raises:
            PromptError: The row can't be asked.
        """
        values = self._require(column, row)
        content = values.get(self.prompts.column, values)
        blank = False
        if column is not None:
            try:
                content = chat.read_content(content)
            except ConfigError as error:
                raise PromptError(self._unmade(row, error)) from error
            blank = isinstance(content, str) and not content.strip()
        text = str(content)
        beyond = self._vocabulary.beyond if self._vocabulary else ()
        limit = self.max_prompt_tokens
        fits = limit is None or len(text.encode()) + overhead <= limit
        if fits and not blank and not any(token in text for token in beyond):
            return 0
        return len(self._made(row).input_ids)

    def _require(self, column: str | None, row: int) -> dict[str, Any]:
        values = self._row(row)
        if column is not None and column not in values:
            place = f" in row {row}" if row else ""
            raise ConfigError(
                f"`column` must be one of {self._source}'s columns {sorted(values)}{place}, "
                f"got {column!r}."
            )
        return values

    def _made(self, row: int) -> Prompt:
        try:
            made = self._make(self._row(row))
            self._check_ids(made.input_ids)
        except PromptError:
            raise
        except Exception as error:  # the template's, or the user's own `make_prompt`
            raise PromptError(self._unmade(row, error)) from error
        return made

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ConfigError("it has no token to go on from.")
        if self._vocabulary is None:
            return
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < self._vocabulary.size:
                raise ConfigError(
                    f"it has the token id {token_id}, and the model's embedding only "
                    f"{self._vocabulary.size} rows."
                )

    def _row(self, row: int) -> dict[str, Any]:
        found = self._rows[row]
        if not isinstance(found, Mapping):
            raise ConfigError(
                f"row {row} of {self._source} must have columns by name, got {found!r:.60}."
            )
        if self.prompts.transform is None:
            return dict(found)
        try:
            changed = self.prompts.transform(dict(found))
        except Exception as error:  # the user's
            raise PromptError(
                f"`transform` failed for row {row} of {self._source}: {error!r}."
            ) from error
        if not isinstance(changed, dict):
            raise PromptError(
                f"`transform` must return the row as a dictionary, got {type(changed).__name__} "
                f"for row {row} of {self._source}."
            )
        return changed

    @property
    def _source(self) -> str:
        path = self.prompts.path
        return repr(path) if isinstance(path, str) else f"the {type(path).__name__} given"

    def _unmade(self, row: int, error: Exception) -> str:
        why = f"{error}" if isinstance(error, ConfigError) else f"{error!r}."
        return (
            f"row {row} of {self._source} can't be made a prompt: {why} Mend the row, or change it "
            "with `transform`."
        )

    def _unusable_message(self, unusable: Mapping[int, PromptError]) -> str:
        row, error = next(iter(unusable.items()))
        others = [str(other) for other in unusable if other != row]
        if not others:
            return str(error)
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""  # noqa: PLR2004
        return f"{error} So it is with {len(others)} other rows: {', '.join(others[:5])}{more}."

    def _too_long_message(self, too_long: Mapping[int, int]) -> str:
        shown = ", ".join(f"row {row} ({n} tokens)" for row, n in list(too_long.items())[:5])
        return (
            f"{len(too_long)} prompt(s) of {self._source} have more than the "
            f"{self.max_prompt_tokens} tokens that the context leaves beside `max_new_tokens`: "
            f"{shown}. Lower `max_new_tokens`, or set `too_long: skip` to leave them out."
        )


def run_seed() -> int:
    """What `lightning.seed_everything` was given in this process or the one that started it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))  # noqa: TID251 - where Lightning leaves it
