"""New folders: `lightning-grpo init [NAME]` to start a task from, `export CHECKPOINT OUT` to load.

An exported checkpoint is a folder that transformers loads.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from lightning_grpo.cli.sources import Parser
from lightning_grpo.errors import ConfigError, UnreadableError
from lightning_grpo.shipped import resolve_path

# -- init ------------------------------------------------------------------------------------------

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


# -- export ----------------------------------------------------------------------------------------

_SHARDS_METADATA = "meta.pt"


def export(argv: Sequence[str]) -> int:
    """Export one checkpoint."""
    parser = Parser(
        prog="lightning-grpo export",
        description="Write the policy of a checkpoint as a Hugging Face folder.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file, or a folder of shards")
    parser.add_argument("out", type=Path, help="the folder to write; must be new or empty")
    parser.add_argument(
        "--adapter", action="store_true", help="of a run with LoRA: the adapter alone, for PEFT"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="of a model that comes with code of its own: run that code, as the run did",
    )
    options = parser.parse_args(list(argv))
    check_paths(options.checkpoint, options.out)
    state = read_checkpoint(options.checkpoint)
    module = build_module(state, options.checkpoint, options.trust_remote_code)
    write = module.export_adapter if options.adapter else module.export
    sys.stdout.write(f"{write(options.out)}\n")
    return 0


def check_paths(checkpoint: Path, out: Path) -> None:
    """Refuse before anything heavy is imported.

    Raises:
        ConfigError: There is no such checkpoint, or the folder holds something already.
    """
    if not checkpoint.exists():
        raise ConfigError("checkpoint", "must exist", str(checkpoint))
    check_new_folder("out", out)


def check_new_folder(setting: str, folder: Path) -> None:
    """Refuse a folder that can't be made, or holds something already.

    Raises:
        ConfigError: With the setting's name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(setting, "must be a new or empty folder", str(folder))
    above = next(each for each in folder.absolute().parents if each.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(
            f"`{setting}` must be in a folder that can be written to, got {str(folder)!r}, which "
            f"would be made in {str(above)!r}."
        )


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint as plain data; the shards of a distributed one are joined.

    Raises:
        UnreadableError: It is neither a file nor a folder of shards.
        ConfigError: It can't be read, or is not a Trainer's.
    """
    if checkpoint.is_dir() and not (checkpoint / _SHARDS_METADATA).is_file():
        raise UnreadableError(
            f"{str(checkpoint)!r} is neither a checkpoint file nor a folder of shards "
            f"(`{_SHARDS_METADATA}` is missing)."
        )
    from lightning_grpo.strategies.checkpoints import (
        read_plain,
        reading,
        require_state,
        whole_state,
    )

    with reading(checkpoint, "checkpoint"):
        state = whole_state(checkpoint) if checkpoint.is_dir() else read_plain(checkpoint)
    require_state(state, checkpoint, "checkpoint")
    return state


def build_module(state: dict[str, Any], checkpoint: Path, trust_remote_code: bool) -> Any:
    """The module with a checkpoint's weights; of its settings only those that make the policy.

    Raises:
        ConfigError: The model would run code of its own, and nobody said that it may.
    """
    from lightning_grpo import hparams
    from lightning_grpo.module import GRPOModule
    from lightning_grpo.strategies.checkpoints import require_own_weights

    saved = state.get("hyper_parameters", {})
    if not isinstance(saved.get("model"), str):
        raise ConfigError(
            f"`checkpoint` must be of a GRPOModule, {str(checkpoint)!r} does not say which `model` "
            "it trained. Name another."
        )
    options = dict(saved.get("model_kwargs") or {})
    if options.get("trust_remote_code") and not trust_remote_code:
        raise ConfigError(
            f"`checkpoint` {str(checkpoint)!r} says that {saved['model']!r} comes with code of its "
            "own, which exporting would run. If you trust both, add --trust-remote-code."
        )
    module = GRPOModule(
        saved["model"], lora=hparams.from_plain(saved.get("lora")), model_kwargs=options or None
    )
    module.configure_model()
    require_own_weights(module, state)
    module.load_state_dict(state.get("state_dict", {}))
    return module
