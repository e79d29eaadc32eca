"""The quickstart on a GPU with the real SGLang: the package's own config with two keys changed.

`trainer.accelerator` and `data.servers`, as a user would; which GPUs serve and train is the
package's choice (of two, the last serves). Kept: the reward of each step and the held-out scores.

    python -m benchmarks.h200.quickstart --out quickstart.json
    python -m benchmarks.h200.quickstart --model HYBRID --flags '{"attention-backend": "triton"}' \
        --out hybrid.json
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

from benchmarks.h200.serving import hardware, parse_arguments, server_python, write_report

FLAGS = {
    "dtype": "bfloat16",
    "attention-backend": "fa3",
    "sampling-backend": "pytorch",
    "disable-prefill-cuda-graph": True,
    "cuda-graph-max-bs-decode": 256,
    "max-running-requests": 256,
    "max-total-tokens": 65536,  # its cache is small; other servers may be starting on the GPU
}


def overrides(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What differs from the shipped config."""
    servers: dict[str, Any] = {
        "class_path": "lightning_grpo.SGLangServers",
        "init_args": {
            "python": server_python(folder),
            "memory_fraction": 0.5,
            "flags": FLAGS | args.flags,
        },
    }
    if args.url is not None:
        servers = {
            "class_path": "lightning_grpo.RunningServers",
            "init_args": {"urls": [args.url]},
        }
    return {
        "trainer": {
            "accelerator": "cpu" if args.smoke else "gpu",
            "devices": 1 if args.smoke else [args.train_device],
            "log_every_n_steps": 1,
            "default_root_dir": str(folder),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "", "version": "run"},
            },
        },
        "data": {} if args.smoke and args.url is None else {"servers": servers},
    }


def curve(folder: Path) -> dict[str, Any]:
    """From the run's metrics: each step's reward, and every validation."""
    with (folder / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, Any] = {"reward": [], "length": [], "step_s": [], "probe": [], "held_out": {}}
    columns = {
        "reward": "reward/mean",
        "length": "completion/length_mean",
        "step_s": "time/step_s",
        "probe": "mismatch/probe",
    }
    for row in rows:
        for name, column in columns.items():
            if row.get(column):
                found[name].append(round(float(row[column]), 5))
        if row.get("eval/avg_at_1"):
            found["held_out"][row["step"]] = round(float(row["eval/avg_at_1"]), 4)
    return found


def main() -> None:
    """One run for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--flags", type=json.loads, default={}, help="of SGLang, as JSON")
    args = parse_arguments(parser)
    report: dict[str, Any] = {"hardware": hardware(), "flags": FLAGS | args.flags, "runs": []}
    for seed in args.seeds:
        folder = Path(tempfile.mkdtemp())
        (folder / "gpu.yaml").write_text(json.dumps(overrides(folder, args)))
        program = "import sys; from lightning_grpo.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "fit"]
        command += ["--config", "quickstart.yaml", "--config", str(folder / "gpu.yaml")]
        command += ["--seed_everything", str(seed)]
        command += ["--model.model", str(args.model.absolute())] if args.model else []
        started = time.perf_counter()
        output = folder / "output.txt"
        with output.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        print(output.read_text(), flush=True)
        run: dict[str, Any] = {"seed": seed, "seconds": round(time.perf_counter() - started, 1)}
        if done.returncode:
            run["error"] = output.read_text()[-3000:]
        if (folder / "run" / "metrics.csv").exists():
            run |= curve(folder)
        report["runs"].append(run)
        write_report(args.out, report)


if __name__ == "__main__":
    main()
