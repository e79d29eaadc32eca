"""Open a dataset as rows; only the kinds of source that need heavy libraries import them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.errors import ConfigError

Rows = Sequence[Mapping[str, Any]]

# What looks like a file: not asked for on the hub, which takes half a minute to give up.
_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst")


def open_rows(path: Any, name: str | None = None, split: str = "train") -> Rows:
    """Rows of a hub dataset, a file, a folder, or whatever already is a sequence of rows.

    Raises:
        ConfigError: There is no such source, split or format.
    """
    if not isinstance(path, str | Path):
        rows = _pick_split(path, split)
        if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
            raise ConfigError(
                f"`path` must be the name of a dataset or file, a dataset or a list of rows, "
                f"got {type(rows).__name__}."
            )
        return rows
    resolved = Path(_resolve(str(path)))
    if resolved.is_file():
        return _read_file(resolved)
    if (resolved / "state.json").is_file() or (resolved / "dataset_dict.json").is_file():
        import datasets

        return _pick_split(datasets.load_from_disk(str(resolved)), split)
    if resolved.suffix in _FILES:
        raise ConfigError(f"`path` must name an existing file, folder or dataset, got {path!r}.")
    return _load_dataset(str(path), str(resolved), name, split)


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
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(
            f"`path` must end in .json, .jsonl or .parquet, got {str(path)!r}. Convert it, a .csv "
            "with `datasets.Dataset.from_csv(FILE).to_json(OUT)`."
        )
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
    rows = _parse(text, str(path))
    if isinstance(rows, list):
        return rows
    raise ConfigError(f"{path} must hold a list of rows, got {type(rows).__name__}.")


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
