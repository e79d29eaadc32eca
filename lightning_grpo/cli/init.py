"""`lightning-grpo init [NAME]`: a folder to start a task of one's own from."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from lightning_grpo.cli.export import check_new_folder
from lightning_grpo.cli.sources import Parser
from lightning_grpo.errors import ConfigError
from lightning_grpo.shipped import resolve_path

_TEMPLATES = Path(__file__).parent.parent / "shipped" / "start"
_ROWS = {"train": 2000, "test": 200}


def init(argv: Sequence[str]) -> int:
    """Make the folder and say how to run it."""
    parser = Parser(
        prog="lightning-grpo init",
        description="Make a folder with a config, a reward and its test, and prompts; it runs at "
        "once on a CPU.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name", type=Path, nargs="?", default=Path("grpo-task"), help="default: grpo-task"
    )
    folder = parser.parse_args(list(argv)).name
    check_new_folder("name", folder)
    try:
        written = write_task(folder)
    except OSError as error:
        raise ConfigError(
            "name",
            f"must be a folder that can be written to ({error.strerror})",
            str(folder),
            "Name another, or free some of its disk.",
        ) from error
    for path in written:
        sys.stdout.write(f"{path}\n")
    sys.stdout.write(
        f"\ncd {shlex.quote(str(folder))}\n"
        "lightning-grpo fit --config config.yaml     # about a minute on 2 CPU cores\n"
    )
    return 0


def write_task(folder: Path) -> list[Path]:
    """Write a task's files.

    Args:
        folder: Where to; made where it is not there.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in sorted(_TEMPLATES.glob("*.in")):
        text = source.read_text()
        if source.name.startswith("README"):
            text = Template(text).substitute(name=folder.resolve().name)
        written.append(folder / source.stem)
        written[-1].write_text(text)
    for name, count in _ROWS.items():
        written.append(folder / f"{name}.jsonl")
        with Path(resolve_path(f"shipped:quickstart/{name}.jsonl")).open() as rows:
            written[-1].write_text("".join(itertools.islice(rows, count)))
    return written
