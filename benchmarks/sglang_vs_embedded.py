"""The quickstart on the real SGLang, by one changed key, against the embedded engine.

Both run `lightning-grpo fit --config quickstart.yaml` on this CPU for 30 steps and save every 10;
`data.servers` differs and nothing else. Held-out accuracy (1,000 fixed problems, one sample each at
temperature 1, answered by the same engine with the same seeds) says whether both learn the same,
the probe of every weight sync whether trainer and servers hold the same weights.

    make test-sglang    # installs SGLang into .venv-sglang, with what it lacks on a CPU
    python benchmarks/sglang_vs_embedded.py --python .venv-sglang/bin/python --out FILE
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 30, 10


def servers_of(kind: str, python: str, tp: int = 1) -> str:
    """The value of the one key."""
    if kind == "embedded":
        return "lightning_grpo.EmbeddedServers"
    settings = {"python": python, "tp": tp, "flags": {"device": "cpu"}}
    return json.dumps({"class_path": "lightning_grpo.SGLangServers", "init_args": settings})


def command_line(name: str, *arguments: str, log: Path) -> None:
    """One command of the package, in a process of its own."""
    program = "import sys; from lightning_grpo.cli.main import main; sys.exit(main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("a") as out:
        subprocess.run(
            [sys.executable, "-c", program, name, *arguments],
            check=True,
            stdout=out,
            stderr=out,
            env=environment,
            cwd=log.parent,
        )


def train(kind: str, seed: int, python: str, out: Path) -> dict:
    """One run: accuracy by step, the largest reading of the probe, and how long a step took."""
    from benchmarks.held_out import accuracy

    out.mkdir(parents=True)
    log = out / "log"
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(out / "checkpoints"),
            "filename": "{step}",
            "every_n_train_steps": EVERY,
            "save_top_k": -1,
        },
    }
    arguments = ["--config", "quickstart.yaml", "--data.servers", servers_of(kind, python)]
    arguments += ["--seed_everything", str(seed), "--data.prompts.seed", str(seed)]
    arguments += ["--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
    arguments += ["--trainer.callbacks", json.dumps([saving])]
    arguments += ["--trainer.default_root_dir", str(out / "run")]
    command_line("fit", *arguments, log=log)
    held_out = {}
    for step in range(EVERY, STEPS + 1, EVERY):
        folder = out / f"model-{step}"
        checkpoint = out / "checkpoints" / f"step={step}.ckpt"
        command_line("export", str(checkpoint), str(folder), log=log)
        held_out[str(step)] = accuracy(folder)
    (metrics,) = (out / "run").rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    probes = [float(row["mismatch/probe"]) for row in rows if row.get("mismatch/probe")]
    seconds = [float(row["time/step_s"]) for row in rows if row.get("time/step_s")]
    return {
        "engine": kind,
        "seed": seed,
        "held_out": held_out,
        "num_syncs_probed": len(probes),
        "probe_max": max(probes),
        "median_step_s": statistics.median(seconds),
    }


def main() -> None:
    """Run each engine with each seed, print as they come, compare the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="an interpreter that has SGLang for CPUs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    python = str(Path(args.python).absolute())
    work = Path(tempfile.mkdtemp(prefix="sglang_vs_embedded_"))
    print(f"logs in {work}", flush=True)
    runs = []
    for seed in args.seeds:
        for kind in ("embedded", "sglang"):
            runs.append(train(kind, seed, python, work / f"{kind}-{seed}"))
            print(json.dumps(runs[-1]), flush=True)
    ask = "import importlib.metadata as m; print(m.version('sglang'))"
    sglang = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "transformers", "lightning")}
        | {"sglang": sglang.stdout.strip()},
        "steps": STEPS,
        "mean_held_out": {kind: mean_by_step(runs, kind) for kind in ("embedded", "sglang")},
        "runs": runs,
    }
    print(json.dumps(report["mean_held_out"]))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def mean_by_step(runs: list[dict], kind: str) -> dict[str, float]:
    """Accuracy after each number of steps, over the seeds."""
    curves = [run["held_out"] for run in runs if run["engine"] == kind]
    return {step: statistics.mean(curve[step] for curve in curves) for step in curves[0]}


if __name__ == "__main__":
    main()
