"""Writing a policy to a folder that transformers and SGLang load."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_grpo.policy.load import without_bars


def export_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes weights, config and tokenizer; the folder is there whole or not at all.

    Everything is written beside it first and then renamed; a folder that was there before is
    replaced. The config written names no attention implementation and turns the KV cache on.

    Args:
        model: The model of transformers (not the wrapper around it).
        tokenizer: Written along, if given.
        folder: Where to.
        state_dict: Full tensors under the checkpoint's names, where the model's own parameters are
            not those (sharded, or with an adapter beside them).

    Returns:
        The folder.
    """
    target = Path(folder).expanduser().absolute()
    with whole_folder(target) as written:
        _write(model, tokenizer, written, state_dict)
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, beside `target`, whose place it takes if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield written
        written.chmod(0o777 & ~_umask())
        _put_in_place(written, target)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    use_cache = model.config.use_cache
    model.config.use_cache = True
    try:
        values = None if state_dict is None else dict(state_dict)
        with without_bars():
            model.save_pretrained(folder, state_dict=values)
    finally:
        model.config.use_cache = use_cache
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _put_in_place(written: Path, target: Path) -> None:
    if not target.exists():
        written.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        written.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
