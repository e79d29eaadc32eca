"""What comes with the package: ready configs, and the quickstart's model and data.

In a wheel the files lie beside this module; in a checkout (and an editable install) the same names
resolve to the repository's `configs/` and `examples/`, where they physically are, once.

| name | what it is |
| --- | --- |
| `shipped:quickstart` | the folder of the quickstart's base model and its tokenizer |
| `shipped:quickstart/train.jsonl` | a data file of the quickstart |
| `quickstart.yaml` | a config, for `--config` where no such file is in the way |
"""

from __future__ import annotations

from pathlib import Path

from lightning_grpo.errors import ConfigError

PREFIX = "shipped:"
_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parent.parent


def resolve_path(name: str) -> str:
    """The file or folder that a `shipped:` name stands for; any other string unchanged.

    Raises:
        ConfigError: Nothing of that name ships; the message lists what does.
    """
    if not name.startswith(PREFIX):
        return name
    known = shipped_names()
    if name not in known:
        raise ConfigError(f"Nothing ships as {name!r}. There is: {', '.join(known)}.")
    return str(known[name])


def resolve_config(name: str) -> str:
    """The config file to read: `name` itself where it exists, else the shipped one of that name.

    Raises:
        ConfigError: Neither exists; the message lists the shipped configs.
    """
    if Path(name).is_file():
        return name
    known = shipped_configs()
    if name not in known:
        raise ConfigError(
            f"No config file {name!r} here, and none of that name ships. "
            f"There is: {', '.join(known)}."
        )
    return str(known[name])


def shipped_names() -> dict[str, Path]:
    """Every `shipped:` name and its place.

    An example is a folder `NAME` of `model/` and `data/`, in the wheel as in the repository.
    """
    out: dict[str, Path] = {}
    for example in _existing(_HERE / "examples", _REPOSITORY / "examples"):
        if (example / "model").is_dir():
            out[PREFIX + example.name] = example / "model"
        for file in sorted((example / "data").glob("*.jsonl")):
            out[f"{PREFIX}{example.name}/{file.name}"] = file
    return out


def shipped_configs() -> dict[str, Path]:
    """Every shipped config and its place."""
    files = _existing(_HERE / "configs", _REPOSITORY / "configs")
    return {file.name: file for file in files if file.suffix == ".yaml"}


def metrics_page() -> Path | None:
    """The page that explains every metric; None where it was not installed."""
    places = (_HERE / "docs/metrics.md", _REPOSITORY / "docs/metrics.md")
    return next((place for place in places if place.is_file()), None)


def _existing(in_wheel: Path, in_repository: Path) -> list[Path]:
    """What the first of the two folders that exists holds, in order of name."""
    folder = in_wheel if in_wheel.is_dir() else in_repository
    return sorted(folder.iterdir()) if folder.is_dir() else []
