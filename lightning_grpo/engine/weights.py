"""New weights: checked as a whole, then copied over the old ones."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.engine.errors import WeightUpdateError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    *(EOFError, SafetensorError, pickle.UnpicklingError),
)
"""What transformers raises for folders that it can't make a model of (RuntimeError: also deep)."""


class ModelWeights:
    """The weights of the running model under the names of a Hugging Face checkpoint.

    Args:
        model: The model that generates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors: dict[str, Tensor] = dict(model.state_dict())
        stored: dict[int, str] = {}
        for name, tensor in self._tensors.items():
            stored.setdefault(tensor.data_ptr(), name)
        self._needed = frozenset(stored.values())

    def check(self, shapes: Mapping[str, Sequence[int]], *, complete: bool = False) -> None:
        """Check names and shapes of new weights.

        Args:
            shapes: Shape of each new tensor.
            complete: Whether all must be there (tied ones once).

        Raises:
            WeightUpdateError: Naming the first that is wrong.
        """
        for name, shape in shapes.items():
            mine = self._tensors.get(name)
            if mine is None:
                raise WeightUpdateError(f"the model has no weight {name!r}")
            if list(mine.shape) != list(shape):
                raise WeightUpdateError(
                    f"weight {name!r} must have shape {list(mine.shape)}, got {list(shape)}"
                )
        if complete:
            given = {self._tensors[name].data_ptr() for name in shapes}
            missing = [n for n in sorted(self._needed) if self._tensors[n].data_ptr() not in given]
            if missing:
                raise WeightUpdateError(
                    f"{len(missing)} weights of the model are missing, {missing[0]!r} first"
                )

    def writer(
        self, tensors: Mapping[str, Tensor], *, complete: bool = False
    ) -> Callable[[], None]:
        """What writes new weights, after all of them were checked."""
        self.check({name: tensor.shape for name, tensor in tensors.items()}, complete=complete)

        def write() -> None:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    self._tensors[name].copy_(tensor)

        return write

    def read_folder(self, path: str) -> dict[str, Tensor]:
        """Read a checkpoint that could replace the running weights.

        Files that name their tensors as the model does are read as they are; anything else goes
        through transformers, which knows how checkpoints of each architecture are named.

        Raises:
            WeightUpdateError: If there is no checkpoint at `path` or it can't be read.
        """
        if not Path(path).is_dir():
            raise WeightUpdateError(
                f"`model_path` must be a folder of this machine (nothing is fetched), got {path!r}"
            )
        try:
            tensors = _read_safetensors(Path(path))
            if tensors is not None and tensors.keys() <= self._tensors.keys():
                return tensors
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            model, info = loaded
        except _UNREADABLE as error:
            raise WeightUpdateError(f"can't load weights from {path!r}: {error}") from error
        for problem in ("missing_keys", "mismatched_keys"):
            if info.get(problem):
                first = min(map(str, info[problem]))
                raise WeightUpdateError(f"weights from {path!r} have {problem}: {first!r} first")
        return dict(model.state_dict())


def _read_safetensors(folder: Path) -> dict[str, Tensor] | None:
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())
        files = sorted({Path(file).name for file in index["weight_map"].values()})
    elif (folder / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        return None
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = opened.get_tensor(name)
    return tensors
