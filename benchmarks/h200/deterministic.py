"""Two deterministic runs on the real SGLang, side by side on one GPU: do they agree bit for bit?

The quickstart with `trainer.deterministic: true`, `--steps` steps each, started at the same time on
one GPU, so that each disturbs the other's timing. Compared: every trajectory (ids, logprobs, weight
versions, rewards) and the weights at the end. `--sampled` runs both without it, to see that they
differ then.

The rule: nothing differs.

    python -m benchmarks.h200.deterministic --out deterministic.json
    python -m benchmarks.h200.deterministic --smoke --out deterministic.json
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.h200.quickstart import FLAGS
from benchmarks.h200.serving import hardware, server_python, write_report
from lightning_grpo.rollout.records import read_batch, trajectory_files

PROGRAM = "import sys; from lightning_grpo.cli.main import main; sys.exit(main())"
COLUMNS = ("time/step_s", "time/weight_sync_s", "mismatch/probe", "reward/mean")


def options(folder: Path, args: argparse.Namespace) -> list[str]:
    """What differs from the shipped config."""
    words = ["--config", "quickstart.yaml", "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.max_steps", str(args.steps), "--trainer.limit_val_batches", "0"]
    words += ["--trainer.deterministic", "false" if args.sampled else "true"]
    if args.smoke:
        return words
    servers = {"python": server_python(folder), "memory_fraction": 0.2, "flags": FLAGS}
    words += ["--trainer.accelerator", "gpu", "--trainer.devices", "1"]
    words += ["--data.servers", "lightning_grpo.SGLangServers"]
    for name, value in servers.items():
        words += [f"--data.servers.{name}", json.dumps(value) if name == "flags" else str(value)]
    return words + args.more


def trained(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Every recorded group in order, and the last checkpoint's weights."""
    groups = []
    for file in sorted(trajectory_files(folder)):
        for group in read_batch(file).groups:
            groups.append(
                [(t.input_ids, t.logprobs, t.versions, t.reward) for t in group.trajectories]
            )
    (last,) = folder.rglob("*.ckpt")
    return groups, torch.load(last, map_location="cpu", weights_only=True)["state_dict"]


def curve(folder: Path) -> dict[str, list[float]]:
    """What the run logged of each step."""
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("time/step_s")]
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in COLUMNS}


def compared(folders: list[Path]) -> dict[str, Any]:
    """How many groups and tensors differ, and by how much."""
    (left, mine), (right, theirs) = (trained(folder) for folder in folders)
    differing = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    tensors = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    return {
        "groups": len(left),
        "groups_that_differ": len(differing),
        "first": differing[0] if differing else None,
        "tensors": len(mine),
        "tensors_that_differ": len(tensors),
        "largest": max(
            ((mine[n].float() - theirs[n].float()).abs().max().item() for n in tensors), default=0.0
        ),
    }


def main() -> None:
    """Both runs, then what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sampled", action="store_true", help="without determinism")
    parser.add_argument("--smoke", action="store_true", help="the embedded engine, on this CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("more", nargs="*", help="further options of fit, after --")
    args = parser.parse_args()
    folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
    began, runs = time.perf_counter(), []
    for folder in folders:
        with (folder / "screen.txt").open("w") as screen:
            command = [sys.executable, "-c", PROGRAM, "fit", *options(folder, args)]
            runs.append(subprocess.Popen(command, stdout=screen, stderr=subprocess.STDOUT))
    statuses = [run.wait() for run in runs]
    report: dict[str, Any] = {"hardware": hardware(), "seconds": time.perf_counter() - began}
    for folder in folders:
        print((folder / "screen.txt").read_text()[-3500:], flush=True)
    if any(statuses):
        report["error"] = f"exit statuses {statuses}"
    else:
        report |= compared(folders) | {"curves": [curve(folder) for folder in folders]}
    write_report(args.out, report)


if __name__ == "__main__":
    main()
