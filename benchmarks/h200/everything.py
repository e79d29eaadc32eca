"""All that one server can be measured with, in one call, what matters most first.

One server is started and each program runs against it, under a limit of its own; what no longer
fits into `--minutes` is left out, by name. Results lie in `--out`, one file a program.

    python -m benchmarks.h200.everything --serve-device 1 --minutes 9 --out results   # two GPUs
    python -m benchmarks.h200.everything --only ipc shared client --out results       # one GPU
    python -m benchmarks.h200.everything --smoke --out results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.h200.serving import make_servers, model_of, parse_arguments

LEAST_S = 20.0
"""Less is not worth a start."""


@dataclass(frozen=True)
class Part:
    """One program with its arguments.

    Attributes:
        program: A module beside this one.
        arguments: Its own.
        limit_s: It is ended then; what it had written by then counts.
        one_gpu: The trainer is on the GPU that serves.
    """

    program: str
    arguments: tuple[str, ...]
    limit_s: float
    one_gpu: bool = False


PARTS = {
    "nccl": Part("weight_sync", ("--transport", "nccl"), 70),
    "ipc": Part("weight_sync", ("--transport", "ipc"), 70, one_gpu=True),
    "lora": Part("options", ("--cases", "lora", "lora_fast"), 80),
    "reference_offloaded": Part("options", ("--cases", "reference_offloaded"), 60),
    "cpu_offload": Part("options", ("--cases", "cpu_offload"), 90),
    "async": Part("async_run", (), 240),
    "shared": Part("async_run", ("--shared", "--staleness", "0", "1"), 240, one_gpu=True),
    "client": Part("client", (), 240),
}


def command(part: Part, args: argparse.Namespace, url: str, model: Path, out: Path) -> list[str]:
    """How a part is started."""
    arguments = list(part.arguments)
    if args.smoke:
        arguments = ["gloo" if word in ("nccl", "ipc") else word for word in arguments]
        arguments = [word for word in arguments if word != "--shared"] + ["--smoke"]
    trainer = args.serve_device if part.one_gpu else args.train_device
    return [
        *(sys.executable, "-m", f"benchmarks.h200.{part.program}", *arguments),
        *("--url", url, "--model", str(model), "--out", str(out)),
        *("--serve-device", str(args.serve_device), "--train-device", str(trainer)),
    ]


def digest(report: dict[str, Any]) -> list[str]:
    """The figures that are judged, a line each."""
    lines = [
        f"{key}: {report[key]}" for key in ("rule", "alone", "while_training") if key in report
    ]
    for case in report.get("cases", []):
        times = {
            name: round(found["median"] * 1e3, 1)
            for name, found in case.items()
            if isinstance(found, dict) and "median" in found and name.endswith("_s")
        }
        lines.append(f"{case['in_flight']} in flight, ms: {times or case.get('error')}")
    for name, found in report.items():
        if isinstance(found, dict) and "error" in found:
            lines.append(f"{name}: {found['error'][-700:]}")
        elif isinstance(found, dict) and "probe_change" in found:
            kept = {key: found.get(key) for key in ("probe", "probe_change", "peak_gib")}
            lines.append(f"{name}: {kept}")
    return lines


def run(name: str, line: list[str], limit_s: float, folder: Path) -> None:
    """One part; its output goes to a file, its figures to the screen."""
    started = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        try:
            process = subprocess.run(
                line, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False
            )
            ended = f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = "ran out of its time"
    print(f"== {name}: {ended} after {time.monotonic() - started:.0f} s", flush=True)
    found = folder / f"{name}.json"
    if found.exists():
        print("\n".join(digest(json.loads(found.read_text()))), flush=True)


def main() -> None:
    """Each part in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parse_arguments(parser)
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    model = model_of(args)
    work = Path(tempfile.mkdtemp())
    servers = make_servers(args, work)
    try:
        servers.api_key = ""
        (handle,) = servers.start(str(model), work)
        print(f"== server after {time.monotonic() - started:.0f} s", flush=True)
        for name in args.only:
            part = PARTS[name]
            left = args.minutes * 60 - (time.monotonic() - started)
            if left < LEAST_S:
                print(f"== {name}: no time left", flush=True)
                continue
            line = command(part, args, handle.url, model, args.out / f"{name}.json")
            run(name, line, min(part.limit_s, left), args.out)
    finally:
        servers.stop()


if __name__ == "__main__":
    main()
