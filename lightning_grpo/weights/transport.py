"""How weights travel: what a transport is, and the one over disk."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_grpo.errors import WeightSyncError, require_number
from lightning_grpo.types import Interruption

Snapshot = Mapping[str, Tensor]
"""Whole weights under their checkpoint names; nobody writes to it once it is handed over."""


class Reply(Protocol):
    """The answer to a weight operation."""

    @property
    def success(self) -> bool:
        """What the server says; false does not prove that nothing changed."""
        ...

    @property
    def message(self) -> str:
        """Why."""
        ...


class UpdateClient(Protocol):
    """The calls to one server that weight sync makes."""

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    async def update(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60.0
    ) -> Reply:
        """Posts a weight operation; a refusal is returned, not raised."""
        ...

    async def abort(self) -> None:
        """Aborts all requests."""
        ...

    async def flush_cache(self) -> bool:
        """Empties the prefix cache; False while requests are pending."""
        ...

    async def update_weight_version(self, label: str) -> None:
        """Renames the loaded weights."""
        ...

    async def score(
        self, input_ids: list[int], *, extra_key: str = "", timeout_s: float | None = None
    ) -> list[float]:
        """Logprob of every token given those before it; entry 0 is 0."""
        ...


class Target(Protocol):
    """One server and the state of its weights."""

    @property
    def client(self) -> UpdateClient:
        """The way to it; another object after a restart."""
        ...

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    @property
    def tp_size(self) -> int:
        """How many of its ranks join a weight group."""
        ...

    @property
    def update_session(self) -> bool:
        """Whether tensor updates must be framed by begin and end."""
        ...

    @property
    def caches_prefixes(self) -> bool:
        """Whether it keeps what it computed of prompts."""
        ...

    @property
    def precision(self) -> str:
        """What it computes in, by its own name: `bfloat16`, `fp8`, ..."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can be talked to."""
        ...

    @property
    def released(self) -> bool:
        """Whether it gave its GPU memory back."""
        ...

    @property
    def renewed(self) -> bool:
        """Whether it may be another process than the one that was known before."""
        ...

    async def release_memory(self) -> None:
        """Has it give its GPU memory back, weights and all."""
        ...

    async def resume_memory(self) -> None:
        """Has it take its memory again; the weights are undefined until an update."""
        ...

    def mark_updating(self) -> None:
        """Its weights are unknown from here on."""
        ...

    def expect(self, version: int, label: str) -> None:
        """It is about to get `version`, which it will call `label`."""
        ...

    def mark_clean(self, version: int, label: str) -> None:
        """It holds `version`, proved."""
        ...

    def mark_dirty(self, reason: str) -> None:
        """Its weights are unknown; it is not used until a complete update succeeds."""
        ...

    def mark_dead(self, reason: str) -> None:
        """It is gone, or as good as gone."""
        ...

    async def pause(self) -> None:
        """Holds its requests back."""
        ...

    async def unpause(self) -> None:
        """Lets it work."""
        ...


class Fleet(Protocol):
    """The servers together, as the pool has them."""

    @property
    def members(self) -> Sequence[Target]:
        """The servers that are used."""
        ...

    @property
    def known(self) -> Sequence[Target]:
        """These, and those that come or go just now."""
        ...

    async def interrupt(self, timeout_s: float = 30.0, mode: Interruption = "abort") -> None:
        """Pauses the servers, every request taken back or kept."""
        ...

    async def resume(self) -> None:
        """Uses clean servers again."""
        ...

    async def wait_until_clean(self, timeout_s: float) -> None:
        """Waits for a server that is on its way back; raises when none is."""
        ...

    def give_up(self, url: str) -> None:
        """A live server can't be updated: replace it, where that is possible."""
        ...


class UpdateRefusedError(WeightSyncError):
    """The server said no; whether its weights changed nevertheless, only a probe can tell."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a transport works.

    Attributes:
        run_dir: The run's own folder.
        model_path: The folder (or hub id) that the servers loaded: the files beside the weights.
        bucket_bytes: Size of flat buckets.
    """

    run_dir: Path
    model_path: Path
    bucket_bytes: int = 512 << 20


class Transport(ABC):
    """Moves one prepared snapshot to servers; the publisher keeps the order of things.

    `in_session` says that `send` is wrapped in `/begin_weight_update` and `/end_weight_update`
    where the server requires it, `prepares_quickly` that servers may stand still during `prepare`.
    """

    in_session = False
    prepares_quickly = True

    @abstractmethod
    def bind(self, place: Place) -> None:
        """Called once, before anything else."""

    @abstractmethod
    def prepare(self, snapshot: Snapshot, version: int) -> int:
        """Makes the snapshot ready to send, also again after a restart. Blocks; gives bytes."""

    @abstractmethod
    async def send(self, target: Target, label: str, timeout_s: float) -> None:
        """Brings what was prepared to one server, which calls it `label` once it has all of it.

        Raises:
            UpdateRefusedError: The server answered no.
            ServerError: It did not answer.
            WeightSyncError: The connection for weights failed.
        """

    @abstractmethod
    async def abandon(self, target: Target) -> None:
        """Drops whatever connects to a server that failed; never raises for a dead one."""

    async def close(self, targets: list[Target]) -> None:
        """Ends what connects to servers that live."""
        for target in targets:
            await self.abandon(target)


def require_success(reply: Reply, target: Target, what: str) -> None:
    """Turns a refusal into an error."""
    if not reply.success:
        raise UpdateRefusedError(f"{target.url} refused {what}: {reply.message}")


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".msgpack", ".h5")
WEIGHTS = "model.safetensors"


class DiskTransport(Transport):
    """Writes each version to a folder that every server can read, and names it to them.

    Args:
        folder: Seen under the same path by trainer and servers; None: `weights/` in the run's
            folder.
        keep: How many versions stay on disk. Only the trainer deletes.
    """

    prepares_quickly = False

    def __init__(self, folder: str | None = None, keep: int = 2) -> None:
        require_number("keep", keep, least=1, whole=True, why="a restarted server loads it")
        self.folder = folder
        self.keep = keep
        self._root: Path | None = None
        self._model_path: Path | None = None
        self._current: Path | None = None

    def bind(self, place: Place) -> None:
        """Fixes where versions are written."""
        # Absolute: servers have working directories of their own.
        root = Path(self.folder) if self.folder else place.run_dir / "weights"
        self._root = root.absolute()
        self._model_path = local_folder(place.model_path)

    def prepare(self, snapshot: Snapshot, version: int) -> int:
        """Writes the version's folder and deletes the oldest beyond `keep`."""
        assert self._root is not None, "the transport was not bound"
        self._current, num_bytes = write_version(self._root, version, snapshot, self._model_path)
        versions = sorted(p for p in self._root.glob("v[0-9]*") if p.suffix != ".partial")
        for old in [p for p in versions if p != self._current][: -(self.keep - 1) or None]:
            shutil.rmtree(old, ignore_errors=True)
        return num_bytes

    async def send(self, target: Target, label: str, timeout_s: float) -> None:
        """Asks the server to load the folder."""
        assert self._current is not None, "nothing was prepared"
        body = {
            "model_path": str(self._current),
            "weight_version": label,
            "flush_cache": False,
            "abort_all_requests": False,
        }
        reply = await target.client.update("/update_weights_from_disk", body, timeout_s)
        require_success(reply, target, f"the weights in {self._current}")

    async def abandon(self, target: Target) -> None:
        """Nothing connects to the server."""


def write_version(
    root: Path, version: int, snapshot: Snapshot, model_path: Path | None
) -> tuple[Path, int]:
    """Writes `root/v000012`, complete or not at all, and returns it with its bytes of weights.

    It is written under another name and renamed at the end: whoever sees the folder sees all of it.
    """
    final = root / f"v{version:06d}"
    partial = root / f"v{version:06d}.partial"
    try:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in snapshot.items()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        if model_path is not None:
            copy_companions(model_path, partial)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise WeightSyncError(
            f"Version {version} could not be written to {final}: {error}."
            " Free space there, or give `DiskTransport(folder)` another folder."
        ) from error
    return final, (final / WEIGHTS).stat().st_size


def local_folder(model_path: Path) -> Path | None:
    """The folder of a model, also where a hub id names one that was downloaded; else None."""
    if model_path.is_dir():
        return model_path
    # Here, not above: only runs that name a hub id need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model_path), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def copy_companions(model_path: Path, folder: Path) -> None:
    """Links (or copies) config and tokenizer files, whatever is not a weight, into `folder`."""
    for source in sorted(model_path.iterdir()):
        if not source.is_file() or source.name.endswith(WEIGHT_SUFFIXES):
            continue
        target = folder / source.name
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
