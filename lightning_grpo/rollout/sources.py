"""Open a dataset as rows; only the kinds of source that need heavy libraries import them."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ConfigError

Rows = Sequence[Mapping[str, Any]]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}

# What looks like a file: not asked for on the hub, which takes half a minute to give up.
_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst")


def open_rows(path: Any, name: str | None = None, split: str = "train") -> Rows:
    """Rows of a hub dataset, a file, a folder, or whatever already holds rows or columns.

    Raises:
        ConfigError: There is no such source, split or format.
    """
    if not isinstance(path, str | Path):
        return _in_memory(path, split)
    resolved = Path(_resolve(str(path)))
    if resolved.is_file():
        return _read_file(resolved)
    if (resolved / "state.json").is_file() or (resolved / "dataset_dict.json").is_file():
        import datasets

        return _pick_split(datasets.load_from_disk(str(resolved)), split)
    if resolved.suffix in _FILES:
        raise ConfigError(f"`path` must name an existing file, folder or dataset, got {path!r}.")
    return _load_dataset(str(path), str(resolved), name, split)


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
        if isinstance(row, slice):
            return [self[each] for each in range(self._length)[row]]
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
    if path.suffix == ".parquet":
        return _ParquetRows(path)
    if path.suffix not in (".json", ".jsonl", *_DELIMITERS):
        raise ConfigError(
            "`path` must end in .json, .jsonl, .parquet, .csv or .tsv, got "
            f"{str(path)!r}. Convert it, or give the rows themselves."
        )
    return _read_text(path)


def _read_text(path: Path) -> Rows:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"`path` must name a file in UTF-8, got {str(path)!r}: {error}. Save it as UTF-8."
        ) from error
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON allows U+2028 and its like unescaped inside a string.
        lines = enumerate(text.split("\n"), start=1)
        return [_parse(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if path.suffix in _DELIMITERS:
        return _read_table(text, str(path), _DELIMITERS[path.suffix])
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
                raise csv.Error(f"it has another number of cells than the header {list(row)[:9]}")
            rows.append(row)
    except csv.Error as error:
        raise ConfigError(f"{where}:{reader.line_num} is no row of a table: {error}.") from error
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error


def _pick_split(source: Any, split: str) -> Rows:
    """The rows of a split, where the source has splits (a dictionary of them)."""
    if not isinstance(source, Mapping):
        return source
    if split not in source:
        raise ConfigError(f"`split` must be one of {sorted(source)}, got {split!r}.")
    return source[split]


class _ParquetRows(Sequence[Mapping[str, Any]]):
    """Rows of a Parquet file, made one at a time from its columns."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        try:
            self._table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(
                f"`path` must name a Parquet file, got {str(path)!r}: {error}."
            ) from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return self._table.take(list(range(len(self)))[row]).to_pylist()
        return self._table.slice(row, 1).to_pylist()[0]
