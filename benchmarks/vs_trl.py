"""This package against TRL's GRPOTrainer: same model, data, reward and settings, on one CPU.

Interleaved pairs in one run, so that whatever else the machine does hits both alike; the first
three steps of each run are left out. Held-out accuracy (1,000 fixed problems, one sample each at
temperature 1) after 10, 20 and 30 steps says whether both learn the same.

    pip install -e ".[bench]"
    python benchmarks/vs_trl.py --pairs 5 --out benchmarks/results/vs_trl.json

TRL may live in an environment of its own: `--trl-python PATH`.
"""

from __future__ import annotations

import argparse
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

HERE = Path(__file__).parent
SKIPPED_STEPS = 3
EVALUATED = (10, 20, 30)


def run_side(python: str, script: str, out: Path, *, steps: int, seed: int, threads: int) -> dict:
    """Run one side in a process of its own and read what it wrote."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [python, str(HERE / script), "--out", str(out)]
    command += ["--steps", str(steps), "--seed", str(seed)]
    with (out / "log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment, cwd=out)
    return json.loads((out / "result.json").read_text())


def samples_per_second(result: dict) -> float:
    """Of the steps after the first three."""
    times = result["step_seconds"][SKIPPED_STEPS:]
    return result["samples_per_step"] * len(times) / sum(times)


def held_out(result: dict) -> dict[str, float]:
    """Accuracy of each saved model, by step."""
    from benchmarks.held_out import accuracy

    return {step: accuracy(folder) for step, folder in result["models"].items()}


def main() -> None:
    """Run the pairs, print as they come, write everything to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accuracy-seeds", type=int, default=3)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--trl-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    work = Path(tempfile.mkdtemp(prefix="vs_trl_"))

    def trl(seed: int, threads: int, name: str, steps: int = args.steps) -> dict:
        return run_side(
            args.trl_python, "trl_side.py", work / name, steps=steps, seed=seed, threads=threads
        )

    # The better of one and two threads, found on a short run of each.
    trials = {
        n: samples_per_second(trl(0, n, f"trl-threads-{n}", steps=8)) for n in args.trl_threads
    }
    threads = max(trials, key=lambda n: trials[n])
    print(f"TRL samples/s by threads: {trials}; using {threads}", flush=True)

    pairs = []
    for k in range(args.pairs):
        theirs = trl(k, threads, f"trl-{k}")
        ours = run_side(
            sys.executable, "our_side.py", work / f"ours-{k}", steps=args.steps, seed=k, threads=1
        )
        pair = {
            "trl_samples_per_s": samples_per_second(theirs),
            "ours_samples_per_s": samples_per_second(ours),
            "ours_phases_s": ours["phases"],
            "trl_phases_s": theirs["phases"],
        }
        pair["ratio"] = pair["ours_samples_per_s"] / pair["trl_samples_per_s"]
        if k < args.accuracy_seeds:
            pair["trl_held_out"], pair["ours_held_out"] = held_out(theirs), held_out(ours)
        pairs.append(pair)
        print(json.dumps(pair), flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "transformers", "lightning")}
        | {"trl": theirs["trl"]},
        "trl_threads": trials,
        "steps": args.steps,
        "median_ratio": statistics.median(p["ratio"] for p in pairs),
        "pairs": pairs,
    }
    print(f"median ratio {report['median_ratio']:.2f}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
