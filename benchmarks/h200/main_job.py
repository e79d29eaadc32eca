"""The main job as a user runs it: `lightning-grpo fit --config gsm8k.yaml`, from start to answer.

Only the model's and the data's paths differ from the shipped config, and where SGLang's own
packages are trimmed (`SGLANG_SITE`) the two flags that they need. The stages, each a command line
of its own in one folder: `fit` (a baseline on all held-out problems, `--steps` optimizer steps,
validations, checkpoints; at `--minutes` it gets SIGTERM, as from a scheduler), `resume`
(`--ckpt_path last`), `validate`, `export`, and `answer`: the exported folder in plain transformers.
The whole screen is kept beside the results, one text file a stage.

    python -m benchmarks.h200.main_job --model MODEL --data GSM8K --strategy fsdp2 --out results
    python -m benchmarks.h200.main_job --stages resume validate export answer ... --out results
    python -m benchmarks.h200.main_job --smoke --out results
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.h200.serving import hardware, server_python
from lightning_grpo.shipped import resolve_path

STAGES = ("fit", "resume", "validate", "export", "answer")
# A file, as the installed command is one: Lightning starts the other ranks by its name.
PROGRAM = "import sys\nfrom lightning_grpo.cli.main import main\nsys.exit(main())\n"
TRIMMED_FLAGS = '{"attention-backend": "triton", "sampling-backend": "pytorch"}'
CURVE = {
    "reward": "reward/mean",
    "length": "completion/length_mean",
    "step_s": "time/step_s",
    "wait_s": "time/wait_rollout_s",
    "sync_s": "time/weight_sync_s",
    "paused_s": "time/servers_paused_s",
    "tokens_per_s": "rollout/tokens_per_s",
    "staleness": "staleness/mean",
    "probe": "mismatch/probe",
    "sent": "mismatch/sent",
    "mismatch": "mismatch/abs_logprob_diff",
    "lag_s": "health/event_loop_lag_s",
}
ANSWER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, device = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
asked = [{"role": "user", "content": "Tom has 3 boxes with 4 pens each. How many pens has he?"}]
ids = tokenizer.apply_chat_template(
    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(device)
said = model.generate(**ids, max_new_tokens=120, do_sample=False)
print(tokenizer.decode(said[0][ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def settings(args: argparse.Namespace, strategy: str, folder: Path) -> list[str]:
    """What differs from the shipped config, as options of the command line."""
    prompts = {"prompts": args.data / "train.jsonl", "val_prompts": args.data / "test.jsonl"}
    options = ["--config", "gsm8k.yaml", "--model.model", str(args.model)]
    for name, path in prompts.items():
        options += [f"--data.{name}.path", str(path)]
    options += ["--trainer.default_root_dir", str(folder), "--trainer.strategy", strategy]
    options += ["--trainer.devices", args.devices] if args.devices else []
    python = server_python(folder)
    if python != "auto":
        options += ["--data.servers.python", python, "--data.servers.flags", TRIMMED_FLAGS]
    if args.smoke:
        options += [
            "--trainer.accelerator",
            "cpu",
            "--data.servers",
            "lightning_grpo.EmbeddedServers",
        ]
        options += ["--data.batch_size", "8", "--data.val_prompts.limit", "20"]
        options += ["--data.workflow.init_args.sampling.max_new_tokens", "48"]
        options += ["--data.prompts.limit", "64", "--model.optimizer.init_args.fused", "false"]
    return options + args.more


def run(command: list[str], screen: Path, minutes: float, folder: Path) -> dict[str, Any]:
    """One command line; its screen goes to a file and is shown, and at its limit it is stopped."""
    started = time.monotonic()
    with screen.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, stdin=subprocess.DEVNULL
        )
        try:
            process.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    print(screen.read_text(errors="replace")[-6000:], flush=True)
    return {"status": process.returncode, "seconds": round(time.monotonic() - started, 1)}


def lightning_grpo(folder: Path, *words: str) -> list[str]:
    """The command line of the package, as a file in a folder."""
    program = folder / "lightning-grpo"
    program.write_text(PROGRAM)
    return [sys.executable, str(program), *words]


def newest(folder: Path) -> Path:
    """The checkpoint that was written last."""
    found = [path for path in folder.rglob("*.ckpt") if not path.is_symlink()]
    return max(found, key=lambda path: path.stat().st_mtime)


def curve(folder: Path) -> dict[str, Any]:
    """From all metrics below a folder: the figures of each step, and every validation."""
    found: dict[str, Any] = {name: [] for name in CURVE} | {"held_out": {}}
    for file in sorted(folder.rglob("metrics*.csv"), key=lambda path: path.stat().st_mtime):
        with file.open() as rows:
            for row in csv.DictReader(rows):
                for name, column in CURVE.items():
                    if row.get(column):
                        found[name].append(round(float(row[column]), 5))
                scores = {k: v for k, v in row.items() if k.startswith("eval/") and v}
                if scores:
                    known = found["held_out"].setdefault(row["step"], {})
                    known |= {k: round(float(v), 5) for k, v in scores.items()}
    return found


def stages(args: argparse.Namespace, strategy: str) -> dict[str, Any]:
    """All stages of one strategy, in order; what fails ends them."""
    folder = (args.work or Path(tempfile.mkdtemp())) / strategy
    folder.mkdir(parents=True, exist_ok=True)
    options = settings(args, strategy, folder)
    report: dict[str, Any] = {}
    for stage in args.stages:
        screen = args.out / f"main_job_{strategy}_{stage}.txt"
        if stage == "fit":
            words = lightning_grpo(folder, "fit", *options, "--trainer.max_steps", str(args.steps))
        elif stage == "resume":
            steps = str(args.steps + args.further_steps)
            more = ["--trainer.max_steps", steps, "--ckpt_path", "last"]
            words = lightning_grpo(folder, "fit", *options, *more)
        elif stage == "validate":
            words = lightning_grpo(folder, "validate", *options, "--ckpt_path", str(newest(folder)))
        elif stage == "export":
            shutil.rmtree(folder / "exported", ignore_errors=True)
            words = lightning_grpo(folder, "export", str(newest(folder)), str(folder / "exported"))
        else:
            device = "cpu" if args.smoke else "cuda"
            words = [sys.executable, "-c", ANSWER, str(folder / "exported"), device]
        minutes = args.minutes if stage in ("fit", "resume") else 5.0
        report[stage] = run(words, screen, minutes, folder)
        print(f"== {strategy} {stage}: {report[stage]}", flush=True)
        stopped = report[stage]["status"] == 128 + signal.SIGTERM and stage in ("fit", "resume")
        if report[stage]["status"] and not stopped:
            break
    return report | {"curve": curve(folder)}


def main() -> None:
    """Each strategy in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a pretrained chat model")
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--strategy", nargs="+", default=["fsdp2"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--devices", help="of the trainer; left to the package where not given")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--further-steps", type=int, default=4, help="after the resume")
    parser.add_argument("--minutes", type=float, default=9.0, help="of fit and resume each")
    parser.add_argument("--work", type=Path, help="where the runs are; resume goes on there")
    parser.add_argument("--smoke", action="store_true", help="small, on this CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("more", nargs="*", help="further options of fit, after --")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.model = Path(resolve_path("shipped:quickstart"))
        args.data = (args.data or args.model.parent / "data").absolute()
        args.steps, args.further_steps = 4, 2
        args.more = [*args.more, "--trainer.val_check_interval", "4"]
    # The stages run in a folder of their own.
    args.model, args.data = args.model.absolute(), args.data.absolute()
    report: dict[str, Any] = {"hardware": hardware(), "strategies": {}}
    for strategy in args.strategy:
        report["strategies"][strategy] = stages(args, strategy)
        (args.out / "h200_main_job.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
