"""`lightning-grpo export CHECKPOINT OUT`: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_grpo.cli.problem import Parser
from lightning_grpo.errors import ConfigError, UnreadableError

_SHARDS_METADATA = "meta.pt"


def run(argv: Sequence[str]) -> int:
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
    options = parser.parse_args(list(argv))
    check_paths(options.checkpoint, options.out)
    from lightning_grpo.module import GRPOModule
    from lightning_grpo.strategies.restoring import reading

    with whole_checkpoint(options.checkpoint) as file, reading(options.checkpoint):
        module = GRPOModule.load_from_checkpoint(file, map_location="cpu")
    export = module.export_adapter if options.adapter else module.export
    sys.stdout.write(f"{export(options.out)}\n")
    return 0


def check_paths(checkpoint: Path, out: Path) -> None:
    """Refuse before anything heavy is imported.

    Raises:
        ConfigError: There is no such checkpoint, or the folder holds something already.
    """
    if not checkpoint.exists():
        raise ConfigError(f"`checkpoint` must exist, got {str(checkpoint)!r}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"`out` must be a new or empty folder, got {str(out)!r}.")


@contextmanager
def whole_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint as one file; the shards of a distributed one are joined in a scratch file."""
    if checkpoint.is_file():
        yield checkpoint
        return
    if not (checkpoint / _SHARDS_METADATA).is_file():
        raise UnreadableError(
            f"{str(checkpoint)!r} is neither a checkpoint file nor a folder of shards "
            f"(`{_SHARDS_METADATA}` is missing)."
        )
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with TemporaryDirectory(dir=checkpoint.parent) as scratch:
        file = Path(scratch) / "whole.ckpt"
        dcp_to_torch_save(checkpoint, file)
        state = torch.load(file, weights_only=True)
        state |= torch.load(checkpoint / _SHARDS_METADATA, weights_only=True)
        torch.save(state, file)
        yield file
