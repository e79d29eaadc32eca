r"""The quickstart's run on a hybrid and on a mixture of experts, beside the dense model that ships.

    python benchmarks/kinds.py --bases build/kinds --out benchmarks/results/kinds.json
    python benchmarks/kinds.py --server sglang embedded --kinds mixture --out FILE \
        --python .venv-sglang/bin/python

All are made by `examples/quickstart/make_base.py` in the same way: `--recurrent 1` is a Qwen3.5 of
a gated delta rule and of full attention, `--experts 8` a Qwen3-MoE. Bases that aren't there are
made, in about ten minutes each. Held-out accuracy (1,000 fixed problems, one sample each) says
whether they learn, the probe of every weight sync whether trainer and servers hold the same.

With `--server sglang` the real SGLang samples on this CPU (`make test-sglang` installs it, with
what it lacks on one), with `--tp 2` in two processes that share each layer. It has a head of its
own for every mixture: beside it mixtures begin with one, a copy of the embedding that they had.
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

import torch

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 30, 10
KINDS = {"dense": (), "hybrid": ("--recurrent", "1"), "mixture": ("--experts", "8")}


def base_of(kind: str, bases: Path) -> str:
    """The model that a run begins with, made if it isn't there."""
    if kind == "dense":
        return "shipped:quickstart"
    folder = bases / kind
    if not (folder / "model" / "config.json").is_file():
        script = ROOT / "examples" / "quickstart" / "make_base.py"
        command = [sys.executable, str(script), "--out", str(folder), *KINDS[kind]]
        subprocess.run(command, check=True)
    return str((folder / "model").absolute())


def with_its_own_head(base: str) -> str:
    """The same model, whose head is no longer its embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = f"{base}-own-head"
    if not Path(folder).is_dir():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def train(kind: str, seed: int, base: str, servers: str, out: Path) -> dict:
    """One run: accuracy by step, how far servers and trainer were apart, seconds of a step."""
    from benchmarks.held_out import accuracy
    from benchmarks.sglang_vs_embedded import command_line
    from lightning_grpo.shipped import resolve_path

    out.mkdir(parents=True)
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            **{"dirpath": str(out / "checkpoints"), "filename": "{step}"},
            **{"every_n_train_steps": EVERY, "save_top_k": -1},
        },
    }
    arguments = ["--config", "quickstart.yaml", "--model.model", base, "--data.servers", servers]
    arguments += ["--seed_everything", str(seed), "--data.prompts.seed", str(seed)]
    arguments += ["--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
    arguments += ["--trainer.callbacks", json.dumps([saving])]
    arguments += ["--trainer.default_root_dir", str(out / "run")]
    command_line("fit", *arguments, log=out / "log")
    held_out = {"0": accuracy(Path(resolve_path(base)))}
    for step in range(EVERY, STEPS + 1, EVERY):
        folder = out / f"model-{step}"
        checkpoint = out / "checkpoints" / f"step={step}.ckpt"
        command_line("export", str(checkpoint), str(folder), log=out / "log")
        held_out[str(step)] = accuracy(folder)
    (metrics,) = (out / "run").rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in rows if row.get(name)]

    probes = column("mismatch/probe")
    return {
        **{"kind": kind, "seed": seed, "held_out": held_out},
        **{"num_syncs_probed": len(probes), "probe_max": max(probes)},
        "abs_logprob_diff_max": max(column("mismatch/abs_logprob_diff")),
        "median_step_s": round(statistics.median(column("time/step_s")), 2),
    }


def main() -> None:
    """Run each kind with each seed, and print as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", type=Path, default=Path("build/kinds"))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--server", nargs="+", choices=["embedded", "sglang"], default=["embedded"])
    parser.add_argument("--python", default="", help="an interpreter that has SGLang for CPUs")
    parser.add_argument("--tp", type=int, default=1, help="of SGLang's servers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from benchmarks.sglang_vs_embedded import servers_of
    from lightning_grpo.servers.sglang import examine_python

    python = str(Path(args.python).absolute()) if args.python else ""
    work = Path(tempfile.mkdtemp(prefix="kinds_"))
    print(f"logs in {work}", flush=True)
    runs = []
    for kind in args.kinds:
        base = base_of(kind, args.bases)
        if kind == "mixture" and "sglang" in args.server:
            base = with_its_own_head(base)
        for server in args.server:
            servers = servers_of(server, python, args.tp)
            for seed in args.seeds:
                run = train(kind, seed, base, servers, work / f"{kind}-{server}-{seed}")
                runs.append({"server": server, "tp": args.tp} | run)
                print(json.dumps(runs[-1]), flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "transformers", "lightning")},
        "steps": STEPS,
        "runs": runs,
    }
    if python:
        report["versions"]["sglang"] = examine_python(Path(python), "cpu").sglang
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
