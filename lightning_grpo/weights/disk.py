"""Weights by way of a folder: each version its own, complete, never changed once it is there."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from lightning_grpo.checks import require_number
from lightning_grpo.errors import WeightSyncError
from lightning_grpo.weights.transport import Place, Snapshot, Target, Transport, require_success

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".msgpack", ".h5")
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
READY = "READY"
CHUNK_BYTES = 16 << 20


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

    It is written under another name and renamed at the end; the READY file is inside by then, so
    that whoever sees the folder sees all of it.
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
        write_manifest(partial, version)
        (partial / READY).touch()
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


def write_manifest(folder: Path, version: int) -> None:
    """Lists every file with its size and checksum."""
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": checksum(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps({"version": version, "files": files}, indent=1))


def check_version(folder: Path) -> None:
    """Proves that a version's folder is whole.

    Raises:
        WeightSyncError: It is not finished, or a file differs from the manifest.
    """
    if not (folder / READY).exists():
        raise WeightSyncError(f"{folder} was never finished: it holds no {READY}.")
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, recorded in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != recorded["bytes"] or checksum(path) != recorded["crc32"]:
            raise WeightSyncError(f"{path} is not what was written ({size} bytes).")


def checksum(path: Path) -> str:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"
