"""A real pretrained chat model learns the quickstart's problems, rendered by its own template.

Nothing but the shipped `quickstart.yaml` with another model, a sentence that asks for the answer's
form, longer completions and GPU settings; one run a seed, side by side, each with a server of its
own on the same GPU. The rule: at least 30 points more of the held-out problems right in each of
three seeds. A small model hardly knows the form: `warm_up.py` teaches it in a minute, and `--base`
scores the untouched model beside it.

    python -m benchmarks.h200.warm_up MODEL train.jsonl WARM --rows 320
    python -m benchmarks.h200.learn --model WARM --base MODEL --out learn.json
    python -m benchmarks.h200.learn --smoke --out learn.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.h200.main_job import TRIMMED_FLAGS, curve, lightning_grpo
from benchmarks.h200.serving import hardware, server_python
from lightning_grpo.shipped import resolve_path

SUFFIX = "\\nThink step by step. End with the answer alone after ####."


def options(args: argparse.Namespace, model: Path, folder: Path, seed: int) -> list[str]:
    """What differs from the shipped config."""
    found = ["--config", "quickstart.yaml", "--seed_everything", str(seed)]
    found += ["--model.model", str(model), "--trainer.default_root_dir", str(folder)]
    found += ["--trainer.max_steps", str(args.steps), "--trainer.val_check_interval", "10"]
    if args.smoke:
        return [*found, "--data.val_prompts.limit", "20", "--trainer.val_check_interval", "2"]
    found += ["--trainer.accelerator", "gpu", "--trainer.strategy", "fsdp2"]
    found += ["--trainer.devices", "1", "--model.optimizer.init_args.lr", str(args.lr)]
    for name in ("prompts", "val_prompts"):
        found += [f"--data.{name}.suffix", SUFFIX.encode().decode("unicode_escape")]
    found += ["--data.workflow.init_args.sampling.max_new_tokens", "96"]
    found += ["--data.batch_size", "32", "--data.val_prompts.limit", "500"]
    found += ["--data.servers", "lightning_grpo.SGLangServers"]
    python = server_python(folder)
    if python != "auto":
        found += ["--data.servers.python", python, "--data.servers.flags", TRIMMED_FLAGS]
    return found


def main() -> None:
    """All seeds at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--base", type=Path, help="an untouched model, scored beside it")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.smoke:
        args.model, args.steps, args.seeds = Path(resolve_path("shipped:quickstart")), 4, [0]
    work = Path(tempfile.mkdtemp())
    started, running = time.monotonic(), []
    planned = [(f"seed {seed}", "fit", args.model, seed) for seed in args.seeds]
    if args.base is not None:
        planned.append(("base", "validate", args.base, 0))
    for name, what, model, seed in planned:
        folder = work / name.replace(" ", "-")
        folder.mkdir()
        with (folder / "screen.txt").open("wb") as screen:
            process = subprocess.Popen(
                lightning_grpo(folder, what, *options(args, model, folder, seed)),
                cwd=folder,
                stdout=screen,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        running.append((name, folder, process))
    report: dict[str, Any] = {
        "hardware": hardware(),
        "steps": args.steps,
        "lr": args.lr,
        "runs": {},
    }
    for name, folder, process in running:
        left = args.minutes * 60 - (time.monotonic() - started)
        try:
            process.wait(max(1.0, left))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(120)
        screen = (folder / "screen.txt").read_text(errors="replace")
        print(f"== {name}: status {process.returncode}\n{screen[-3000:]}", flush=True)
        report["runs"][name] = {"status": process.returncode, **curve(folder)}
    held_out = [run["held_out"] for name, run in report["runs"].items() if name != "base"]
    report["gain"] = [
        round(list(steps.values())[-1]["eval/avg_at_1"] - steps["0"]["eval/avg_at_1"], 4)
        for steps in held_out
        if "0" in steps
    ]
    report["seconds"] = round(time.monotonic() - started, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"== held-out gain by seed: {report['gain']}", flush=True)


if __name__ == "__main__":
    main()
